"""The class of all commands: a flag with a single value is given once, and one of another command is translated."""

from collections import Counter
from typing import Any

from typer import TyperException
from typer.core import TyperCommand, TyperGroup, TyperOption

_SAME = (("--seq-len", "--window"), ("--samples", "--max-windows"))  # what commands call by different names

_UNCUT = 1000  # characters


class Group(TyperGroup):
    """A group whose line in the list of commands is wrapped, not cut."""

    def get_short_help_str(self, limit: int = 0) -> str:
        """The first sentence of its help."""
        return super().get_short_help_str(_UNCUT)


class Command(TyperCommand):
    """A command that refuses a repeated flag, of which only the last value would count.

    Of an unknown flag that another command has it names its own.
    """

    def get_short_help_str(self, limit: int = 0) -> str:
        """The first sentence of its help, which is wrapped, not cut."""
        return super().get_short_help_str(_UNCUT)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse, after a look at how often each flag is given."""
        try:
            _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        except TyperException as error:
            name = getattr(error, "option_name", None)
            own = {flag for parameter in self.params for flag in parameter.opts}
            for other in (flag for pair in _SAME if name in pair for flag in pair if flag in own - {name}):
                ctx.fail(f"No such option: {name}. Did you mean '{other}'?")
            raise
        for parameter, times in Counter(given).items():
            if isinstance(parameter, TyperOption) and times > 1 and not (parameter.multiple or parameter.count):
                names = "/".join([parameter.opts[0], *parameter.secondary_opts[:1]])
                ctx.fail(f"{names} is given {times} times; give it once")
        return super().parse_args(ctx, args)
