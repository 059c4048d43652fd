"""The one place where transformers builds configs, tokenizers and models.

Left to its defaults, transformers asks on the terminal whether to run a model's Python files, and takes any line from
stdin that starts with `y` for consent. Every call here says yes or no itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcli.utils.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def pretrained(auto: Any, source: Path | PreTrainedConfig, *, trust_remote_code: bool, **options: Any) -> Any:
    """What a class of transformers (`AutoConfig`, `AutoTokenizer`, `AutoModelForCausalLM`) makes of a model.

    Args:
        source: a local folder, or a config to build a model of random weights from.
        trust_remote_code: whether Python files that belong to the model may run.
        options: of the class's `from_pretrained` or `from_config`.

    Raises:
        UsageError: the model needs its own code, which is not trusted.
        Exception: transformers reports an invalid value by whatever exception its class raises.
    """
    try:
        if isinstance(source, Path):
            return auto.from_pretrained(
                source,
                trust_remote_code=trust_remote_code,
                local_files_only=not trust_remote_code,  # a model may name code of another repository
                **options,
            )
        return auto.from_config(source, trust_remote_code=trust_remote_code, **options)
    except ValueError as error:
        if trust_remote_code or "trust_remote_code" not in str(error):
            raise
        place = source if isinstance(source, Path) else f"a {source.model_type} model"
        raise UsageError(
            f"{place} needs Python code of its own, which qcli does not run unasked",
            hint="read that code; --trust-remote-code runs it",
        ) from None
