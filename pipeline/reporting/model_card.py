"""The README.md of a finished student."""

from typing import Any

import yaml


def model_card(base: str, teacher: str | None, settings: dict[str, Any]) -> str:
    """What the student was made from and how, as a Hugging Face model card."""
    how = f"distilled from the cached word of {teacher}" if teacher else "fine-tuned without a teacher (the control of a distillation)"
    front = yaml.safe_dump({"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["distillation"]}, sort_keys=False)
    body = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    return (
        f"---\n{front}---\n\n# A student of {teacher or base}\n\n"
        f"Made from {base} and {how}. The licences of both, and of the text, apply to it.\n\n"
        f"```yaml\n{body}```\n\n"
        "The manifest.json one folder up says exactly what it was made from: content hashes of the data, the models and the cache.\n"
    )
