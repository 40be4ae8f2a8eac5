"""The `pipeline` command. Imports nothing heavy: a command loads what it needs when it is called."""

import errno
import importlib
import json
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

import click

from pipeline.config import load_ablation, load_experiment
from pipeline.errors import ConfigError, InputError, PipelineError
from pipeline.files import appears_whole
from pipeline.reporting.tables import comparison_csv, comparison_table, comparison_text
from pipeline.running.ablation import results, trials
from pipeline.running.ablation import run as run_trials
from pipeline.running.folder import FinishedFolder, findings, repair
from pipeline.running.runner import Runner, is_main_process
from pipeline.running.stopping import stops_when_asked
from stages import STAGES


class PipelineGroup(click.Group):
    """Turns the library's errors into one message and the exit status that they carry."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except PipelineError as error:
            _fail(context, str(error), error.exit_status)
        except BrokenPipeError:
            # whoever read our output has seen enough; nothing more is written there, not even when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            context.exit(1)
        except OSError as error:
            causes = {errno.ENOSPC: "Free some space. ", errno.EACCES: "Look at its permissions. ", errno.EROFS: "Give a folder that can be written with --runs. "}
            advice = causes.get(error.errno or 0, "") + "The same command again goes on where it stopped."
            _fail(context, f"{error.strerror or error}: {error.filename or 'a file'}. {advice}", 1)
        except (KeyboardInterrupt, click.exceptions.Exit, click.ClickException):
            raise
        except Exception as error:
            among = (
                ""
                if os.environ.get("WORLD_SIZE", "1") == "1"
                else "\nThis is one of several processes. If another has ended before it, that one's message says why; the same command goes on from the last checkpoint."
            )
            _fail(context, f"{type(error).__name__}: {error}\nThis is not an error that pipeline knows. `pipeline --debug ...` shows where it arose; what was finished is kept.{among}", 1)


def _fail(context: click.Context, message: str, status: int) -> None:
    if context.params.get("debug"):
        traceback.print_exc()
    click.echo(f"Error: {message}", err=True)
    context.exit(status)


@click.group(cls=PipelineGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--runs", type=click.Path(path_type=Path, file_okay=False), default=Path("runs"), show_default=True, help="Where the runs' folders are.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.version_option(package_name="distillation-pipeline")
@click.pass_context
def main(context: click.Context, runs: Path, debug: bool) -> None:
    """Run a large teacher once, keep what it says, and train any number of students from that."""
    context.obj = runs
    # torch then asks Linux for huge pages: without them most of a CPU step's time goes into page faults
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _experiment_options(command: Any) -> Any:
    for decorate in (
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else there."),
        click.option("--use", "given", multiple=True, metavar="STAGE=FOLDER", help="Take this finished folder for a stage."),
        click.option("--expect", "roots", multiple=True, metavar="ROOT", help="The root (sha256:...) of the folder given with --use, as `pipeline verify` prints it."),
        click.option("--set", "changes", multiple=True, metavar="SECTION.KEY=VALUE", help="Change a setting of the YAML."),
        click.argument("experiment", type=click.Path(path_type=Path)),
    ):
        command = decorate(command)
    return click.pass_obj(command)


def _runner(runs: Path, experiment: Path, changes: tuple[str, ...], given: tuple[str, ...], roots: tuple[str, ...]) -> Runner:
    folders = _given(given)
    loaded = load_experiment(experiment, list(changes))
    if "cache-teacher" not in folders:
        loaded.check_cache_suffices()
    return Runner(STAGES, loaded, runs, folders, roots, say=lambda text: click.echo(text, err=True))


def _given(entries: tuple[str, ...]) -> dict[str, Path]:
    folders = {}
    for entry in entries:
        stage, equals, folder = entry.partition("=")
        if not equals:
            raise InputError(f"--use {entry}: give it as STAGE=FOLDER.")
        folders[stage] = Path(folder)
    return folders


def _add_stage_command(name: str, text: str) -> None:
    @main.command(name, help=text)
    @_experiment_options
    def command(runs: Path, experiment: Path, changes: tuple[str, ...], given: tuple[str, ...], roots: tuple[str, ...], as_json: bool) -> None:
        runner = _runner(runs, experiment, changes, given, roots)
        with stops_when_asked():
            report = runner.run(name)
        if is_main_process():
            _publish(runner, report)
            _show(report, as_json)


for _stage in STAGES:
    _add_stage_command(_stage.name, _stage.help)


@main.command("run")
@_experiment_options
def run_all(runs: Path, experiment: Path, changes: tuple[str, ...], given: tuple[str, ...], roots: tuple[str, ...], as_json: bool) -> None:
    """Every stage that is not finished, in order."""
    runner = _runner(runs, experiment, changes, given, roots)
    reports = []
    with stops_when_asked():
        for stage in runner.planned():
            reports.append(runner.run(stage.name))
            if is_main_process() and not as_json:
                click.echo(f"{stage.name}: {reports[-1]['state']} ({reports[-1]['folder']})", err=True)
    if not is_main_process():
        return
    _publish(runner, reports[-1])
    if as_json:
        click.echo(json.dumps({"stages": reports}))
    else:
        _show(reports[-1], False)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else there.")
@click.option("--use", "given", multiple=True, metavar="STAGE=FOLDER", help="Take this finished folder for a stage of all variants.")
@click.option("--expect", "roots", multiple=True, metavar="ROOT", help="The root (sha256:...) of the folder given with --use.")
@click.option("--base", type=click.Path(path_type=Path), metavar="EXPERIMENT", help="Another experiment than the one that the file names; for another name of the tables, --name.")
@click.option("--name", metavar="NAME", help="Under which the tables are put.")
@click.option("--set", "changes", multiple=True, metavar="SECTION.KEY=VALUE", help="Change a setting of all variants.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="So many runs at once.")
@click.option("--devices", metavar="0,1,...", help="CUDA devices: one run on each at a time.  [default: as many as --jobs on what there is]")
@click.argument("ablation", type=click.Path(path_type=Path))
@click.pass_obj
def ablate(
    runs: Path,
    ablation: Path,
    given: tuple[str, ...],
    roots: tuple[str, ...],
    base: Path | None,
    name: str | None,
    changes: tuple[str, ...],
    jobs: int,
    devices: str | None,
    as_json: bool,
) -> None:
    """Changes to one experiment: train and evaluate what is missing, from one cache, and compare. Never asks a teacher."""
    if any(change.startswith(("training.seed=", "name=")) for change in changes):
        raise ConfigError("--set: the seeds of an ablation are its `seeds`, and --name is the name of its tables.")
    if devices is not None and not all(part.strip().isdecimal() for part in devices.split(",")):
        raise ConfigError(f"--devices {devices}: give CUDA's numbers, such as 0,1.")
    wanted = load_ablation(ablation, {"base": str(base.absolute()) if base else None, "name": name})
    if wanted.name in {stage.folder for stage in STAGES}:
        raise ConfigError(f"An ablation cannot be called {wanted.name}: the folder of that stage is there. Give another `name`, or --name.")
    found = trials(wanted, ablation.parent, STAGES, runs, _given(given), roots, changes)
    place = runs / wanted.name
    with stops_when_asked():
        run_trials(found, place / "logs", list[str | None](devices.split(",")) if devices else [None] * jobs, lambda text: click.echo(text, err=True))
    told = results(found)
    comparison = importlib.import_module("pipeline.reporting.comparison")
    evaluated = [one.evaluated for one in importlib.import_module("pipeline.reporting.inspection_evaluations").of_trials(told, place)]
    rows = comparison.compared(comparison.rows_of(evaluated, (comparison.DISTILLED, comparison.CONTROL)))
    notes = comparison.notes(evaluated, rows)
    _write(place, {"ablation.md": comparison_table(rows, notes), "ablation.csv": comparison_csv(rows), "ablation.json": json.dumps({"rows": rows, "notes": notes, "trials": told}, indent=1)})
    click.echo(json.dumps({"folder": str(place), "rows": rows, "notes": notes}) if as_json else f"{comparison_text(rows, notes)}\n{place / 'ablation.md'}, ablation.csv, ablation.json")


def _write(place: Path, contents: dict[str, str | bytes]) -> None:
    place.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        with appears_whole(place / name) as temporary:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@main.command()
@click.argument("folders", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="FOLDER...")
@click.option(
    "--sort",
    metavar="FIGURE",
    default="kl_to_teacher",
    show_default=True,
    help="What the best is first by: kl_to_teacher, bits_per_byte, top1_agreement, accuracy; where there are such token_accuracy, rougeL, or a benchmark's name; or variant: by name.",
)
@click.option("--baseline", metavar="NAME", help="The row that the others' differences are from.  [default: the first variant of the first folder]")
@click.option("--format", "form", type=click.Choice(["text", "markdown", "csv", "json"]), default="text", show_default=True, help="What is printed.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), metavar="DIR", help="Also write comparison.md, .csv, .json and .png there.")
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
def compare(folders: tuple[Path, ...], sort: str, baseline: str | None, form: str, out: Path | None, as_json: bool) -> None:
    """One table of several evaluations: mean, spread over seeds, 95 % intervals, differences. FOLDER: of evaluate, an experiment or an ablation."""
    comparison = importlib.import_module("pipeline.reporting.comparison")
    evaluated = [one.evaluated for one in importlib.import_module("pipeline.reporting.inspection_evaluations").found_in(folders)]
    rows = comparison.compared(comparison.rows_of(evaluated), baseline, sort)
    notes = comparison.notes(evaluated, rows)
    told = json.dumps({"rows": rows, "notes": notes})
    if out is not None:
        picture = importlib.import_module("pipeline.reporting.report").picture(rows)
        _write(out, {"comparison.md": comparison_table(rows, notes), "comparison.csv": comparison_csv(rows), "comparison.json": told, "comparison.png": picture})
    shown = {"text": comparison_text(rows, notes), "markdown": comparison_table(rows, notes), "csv": comparison_csv(rows), "json": told}
    click.echo(shown["json" if as_json else form].removesuffix("\n"))


@main.command()
@click.argument("folders", type=click.Path(path_type=Path), nargs=-1, required=True, metavar="FOLDER...")
@click.option("--sort", metavar="FIGURE", default="kl_to_teacher", show_default=True, help="As of `pipeline compare`.")
@click.option("--baseline", metavar="NAME", help="As of `pipeline compare`.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, metavar="FILE.html", help="Where the page goes.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else there.")
def report(folders: tuple[Path, ...], sort: str, baseline: str | None, out: Path, as_json: bool) -> None:
    """One HTML page of several evaluations, with all plots in it. FOLDER: as of `pipeline compare`."""
    comparison = importlib.import_module("pipeline.reporting.comparison")
    found = importlib.import_module("pipeline.reporting.inspection_evaluations").found_in(folders)
    evaluated = [one.evaluated for one in found]
    table = comparison.rows_of(evaluated)
    rows = comparison.compared(table, baseline, sort)
    notes = comparison.notes(evaluated, rows)
    page = importlib.import_module("pipeline.reporting.report").report(found, table, rows, notes)
    _write(out.parent, {out.name: page})
    click.echo(json.dumps({"report": str(out), "rows": rows, "notes": notes}) if as_json else str(out))


@main.command()
@_experiment_options
def status(runs: Path, experiment: Path, changes: tuple[str, ...], given: tuple[str, ...], roots: tuple[str, ...], as_json: bool) -> None:
    """Which stages are finished, begun or missing, and what differs from the nearest finished one."""
    rows = _runner(runs, experiment, changes, given, roots).status()
    if as_json:
        click.echo(json.dumps({"stages": rows}))
        return
    for row in rows:
        click.echo(f"{row['stage']:<16} {row['state']:<24} {row['folder']}")
        if "why" in row:
            click.echo(f"{'':<16} {row['why']}")
        if row["nearest"]:
            click.echo(f"{'':<16} nearest: {row['nearest']['folder']}, differs in {', '.join(row['nearest']['differs'])}")
        if row.get("reusable", {}).get("made"):
            click.echo(f"{'':<16} {row['reusable']['made']} of {row['reusable']['of']} pieces are there already")


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--fast", is_flag=True, help="Look at commits, manifest and sizes only.")
@click.option("--deep", is_flag=True, help="Also compute the digest of each file's rows again.")
@click.option("--recompute", type=click.IntRange(min=1), metavar="N", help="Also ask the teacher again, about N shards of a cache.")
@click.option("--expect", metavar="ROOT", help="The root (sha256:...) that the folder must have.")
@click.option("--repair", "mend", is_flag=True, help="Put what is damaged into the quarantine, so that a rerun of the stage redoes only that.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else there.")
@click.pass_obj
def verify(runs: Path, folder: Path, fast: bool, deep: bool, recompute: int | None, expect: str | None, mend: bool, as_json: bool) -> None:
    """Hash and decode everything in a run's folder again, and name every damaged file.

    Exit status: the sum of 1 (damaged), 2 (untrusted: not listed, or not what was expected), 4 (could not be read) and 8 (made
    with mixed numerics: different devices, batch sizes or threads).
    """
    if not any((folder / name).exists() for name in ("manifest.json", "plan.json", "commits")):
        raise InputError(f"{folder} is no run's folder: it has no manifest.json, no plan.json and no commits.")
    if fast and (deep or recompute):
        raise InputError("--fast looks at no file's bytes: leave it out, or leave out --deep and --recompute.")
    found = findings(folder, fast, expect)
    finished = (folder / "manifest.json").exists()
    if recompute and not finished:
        raise InputError(f"{folder} has not finished, so there is nothing to compare with: leave out --recompute.")
    if not found.damaged and not found.unchecked and finished and not fast:
        inspection = importlib.import_module("pipeline.reporting.inspection")
        found.damaged |= inspection.undecodable(folder)
        if deep and not found.damaged:
            found.damaged |= inspection.other_rows(folder)
        if recompute and not found.damaged:
            found.damaged |= importlib.import_module("stages.cache_teacher").recomputed(folder, recompute, runs)
    mends = mend and bool(found.damaged or found.untrusted.keys() - {"manifest.json"})
    if mends:
        repair(folder, found.damaged)
    if as_json:
        told = {"damaged": found.damaged, "untrusted": found.untrusted, "unchecked": found.unchecked, "mixed_numerics": found.mixed}
        click.echo(json.dumps({"folder": str(folder), **told, "repaired": mends}))
    else:
        for file, text in [*found.damaged.items(), *found.untrusted.items(), *found.unchecked.items()]:
            click.echo(f"{folder / file} {text}" if not text.startswith(str(folder)) else text)
        if found.mixed:
            click.echo("Its pieces were made on different devices, batch sizes or thread counts: the last bits of their numbers depend on that.")
        fine = "Nothing is missing or of another size." if fast else "Everything is as it was written."
        if wrong := len(found.damaged | found.untrusted | found.unchecked):
            away = " What is damaged or not listed is in the quarantine; run the stage again." if mends else " --repair puts what is damaged or not listed out of the way."
            mendable = found.damaged or found.untrusted.keys() - {"manifest.json"}
            fine = f"{wrong} {'file is' if wrong == 1 else 'files are'} not as {'written' if mendable else 'expected'}.{away if mendable else ''}"
        click.echo(fine)
        if found.left_behind:
            click.echo(f"{len(found.left_behind)} files that may be left behind are not here, {min(found.left_behind)} for one.")
        if (folder / "manifest.json").exists() and not found.damaged:
            click.echo(FinishedFolder(folder).root)
    if found.exit_status:
        raise click.exceptions.Exit(found.exit_status)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--record", metavar="ID", help="Show one record's targets, each position's strongest token first.")
@click.option("--attention", metavar="LAYER,QUERY", help="Of that record, the strongest keys of the row at position QUERY. LAYER alone, with --png: all rows.")
@click.option("--png", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Draw a cache's kept mass and bytes by column, or a record's attention, into this file.")
@click.option("--student", type=click.Path(path_type=Path, exists=True, file_okay=False), metavar="FOLDER", help="With --attention and --png: a finished student, to be drawn beside the teacher.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else there.")
def inspect(folder: Path, record: str | None, attention: str | None, png: Path | None, student: Path | None, as_json: bool) -> None:
    """What is in a finished folder; of a cache: kept tokens, kept mass, bytes by column, or one record's targets or attention."""
    finished = _finished(folder)
    if attention is not None:
        if record is None:
            raise InputError("--attention shows where the teacher looks in one record: name it with --record.")
        click.echo(_attention(folder, record, attention, png, student, as_json))
        return
    if student is not None:
        raise InputError("--student is drawn beside the teacher's attention: give --record, --attention and --png, too.")
    if record is not None and png is not None:
        raise InputError("--png draws a whole cache, or with --attention one record: leave out --png or --record.")
    inspection = importlib.import_module("pipeline.reporting.inspection")
    if record is not None:
        shown = inspection.record(folder, record)
        click.echo(json.dumps(shown) if as_json else inspection.record_as_text(folder, record))
    elif png is not None or finished.manifest["stage"] == "cache-teacher":
        shown = inspection.cache(folder)
        if png is not None:
            importlib.import_module("pipeline.reporting.plots").plot_cache(png, shown)
        click.echo(json.dumps(shown) if as_json else inspection.cache_as_text(shown))
    else:
        shown = finished.summary
        click.echo(json.dumps(shown) if as_json else inspection.as_text(shown))


def _attention(folder: Path, record: str, attention: str, png: Path | None, student: Path | None, as_json: bool) -> str:
    layer, comma, query = attention.partition(",")
    if not layer.isdecimal() or (comma and not query.isdecimal()) or not (comma or png) or (student and not png):
        raise InputError("Give --attention as LAYER,QUERY, such as 11,40; or as LAYER with --png FILE, and with --student FOLDER if you like.")
    reporting = importlib.import_module("pipeline.reporting.inspection_attention")
    if png:
        importlib.import_module("pipeline.reporting.plots").plot_attention(png, reporting.sides(folder, record, int(layer), student), record)
    if not comma:
        return json.dumps({"png": str(png)}) if as_json else str(png)
    shown = reporting.row(folder, record, int(layer), int(query))
    return json.dumps(shown) if as_json else str(reporting.as_text(shown))


@main.command("inspect-projection")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--cache", type=click.Path(path_type=Path, exists=True, file_okay=False), metavar="FOLDER", help="The cache that it was made for, if that does not lie beside it.")
@click.option("--teacher-positions", type=click.IntRange(min=0), default=0, metavar="N", help="Also load the teacher, ask it at N positions, and tell how far the targets are from that.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else there.")
def inspect_projection(folder: Path, cache: Path | None, teacher_positions: int, as_json: bool) -> None:
    """What a finished projection is worth, before any training: measured on the cache's held-out records."""
    _finished(folder)
    reporting = importlib.import_module("pipeline.reporting.inspection_projection")
    found = reporting.measured(folder, cache, teacher_positions)
    click.echo(json.dumps(found) if as_json else reporting.as_text(found))


@main.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--format", "form", type=click.Choice(["plain"]), default="plain", show_default=True, help="plain: Parquet with token ids and log-probabilities as ordinary list columns.")
@click.option("--to", type=click.Path(path_type=Path, file_okay=False), required=True, metavar="DIR", help="Where the files go, one a shard; none may be there already.")
@click.option("--split", type=click.Choice(["train", "heldout"]), help="Only this split.  [default: both]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else there.")
def export(folder: Path, form: str, to: Path, split: str | None, as_json: bool) -> None:
    """A finished cache as plain Parquet, for `datasets`, DuckDB and polars."""
    finished = _finished(folder)
    if finished.manifest["stage"] != "cache-teacher":
        raise InputError(f"{folder} is a folder of {finished.manifest['stage']}, not a cache. Give the folder of a finished cache-teacher.")
    written = importlib.import_module("pipeline.cache.export").export_plain(finished.file, to, [split] if split else ["train", "heldout"])
    click.echo(json.dumps({"folder": str(folder), "format": form, "files": [str(file) for file in written]}) if as_json else "\n".join(map(str, written)))


def _finished(folder: Path) -> FinishedFolder:
    if not (folder / "manifest.json").exists():
        raise InputError(f"{folder} is no finished folder: it has no manifest.json.")
    return FinishedFolder(folder)


def _publish(runner: Runner, report: dict[str, Any]) -> None:
    """Put the evaluation's results under the experiment's name, where people look for them."""
    if report["stage"] != "evaluate":
        return
    place = runner.runs / runner.experiment.name
    place.mkdir(parents=True, exist_ok=True)
    finished = FinishedFolder(Path(report["folder"]))
    for name in finished.names():
        shutil.copyfile(finished.file(name), place / name)


def _show(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(report))
        return
    if report["stage"] == "evaluate":
        click.echo(FinishedFolder(Path(report["folder"])).file("table.md").read_text(encoding="utf-8"))
    else:
        click.echo(f"{report['stage']}: {report['state']}\n{report['folder']}")
        for key, value in report["summary"].items():
            click.echo(f"  {key}: {value}")


if __name__ == "__main__":
    sys.exit(main())
