"""The class of all commands: a flag with a single value is given once."""

from collections import Counter
from typing import Any

from typer.core import TyperCommand, TyperOption


class Command(TyperCommand):
    """A command that refuses a repeated flag, of which only the last value would count."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse, after a look at how often each flag is given."""
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        for parameter, times in Counter(given).items():
            if isinstance(parameter, TyperOption) and times > 1 and not (parameter.multiple or parameter.count):
                names = "/".join([parameter.opts[0], *parameter.secondary_opts[:1]])
                ctx.fail(f"{names} is given {times} times; give it once")
        return super().parse_args(ctx, args)
