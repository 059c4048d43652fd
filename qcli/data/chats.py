"""Chats as text, through the chat template of a model's tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qcli.data.row_texts import Messages, Render
from qcli.utils.errors import UsageError

if TYPE_CHECKING:
    from qcli.models.source import ModelSource

_DEFAULT = "default"  # of several templates
_TODAY = "strftime_now"
_ROLES = "most templates take an optional system message, then user and assistant in turns"
# In place of the function of transformers, without a change of the white space that comes after.
_ONE_DAY = "{%- macro " + _TODAY + "(format) -%}26 Jul 2024{%- endmacro +%}"


def chat_template(source: ModelSource) -> str | None:
    """The chat template of a model's tokenizer; see `template_of`."""
    return template_of(source.tokenizer())


def template_of(tokenizer: Any) -> str | None:
    """The chat template of a tokenizer or a processor, its default one if there are several.

    Where it writes today's date, it writes that of one day: the same rows are the same text tomorrow.
    """
    templates: Any = getattr(tokenizer, "chat_template", None)
    template = templates.get(_DEFAULT) if isinstance(templates, dict) else templates
    return f"{_ONE_DAY}{template}" if template and _TODAY in template else template or None


def chat_render(source: ModelSource) -> Render:
    """What makes text of chats for a model; errors name the row.

    Its UsageError: the tokenizer has no chat template, or the template refuses the chat.
    """

    def render(messages: Messages, place: str) -> str:
        if (template := chat_template(source)) is None:
            raise UsageError(
                f"{place} is a chat, and {source.path} has no chat template",
                hint="a template makes plain text of columns: data: {path: ..., template: '{prompt} {completion}'}",
            )
        tokenizer: Any = source.tokenizer()
        try:
            return str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False))
        except Exception as error:  # the template is a program of the model's
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise UsageError(
                f"{place}: the chat template of {source.path} refuses it: {reason}", hint=_ROLES
            ) from error

    return render
