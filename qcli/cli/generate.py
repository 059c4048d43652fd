"""`qcli generate`: text from any model that qcli opens."""

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from qcli.cli import _flags as flags
from qcli.cli.ui.errors import show_error
from qcli.cli.ui.session import Session
from qcli.cli.ui.tables import size
from qcli.utils.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from qcli.inference.generate import Generation
    from qcli.inference.prompt import Message

_RESET = "/reset"


def generate(
    model: flags.Model,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Text to continue. Default: all of stdin, unless a terminal.")
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Answer the prompt by the model's chat template; without one, hold a conversation on the terminal.",
        ),
    ] = False,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message of the chat.")] = None,
    chat_template: Annotated[
        str | None, typer.Option(metavar="NAME", help="Chat template, of a model that has several.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Generate at most N tokens.")] = 256,
    temperature: Annotated[
        float, typer.Option(metavar="T", min=0.0, help="Sample at this temperature; 0: the most probable token.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(metavar="P", help="Sample from the most probable tokens, together of probability P."),
    ] = 1.0,
    seed: Annotated[int, typer.Option(metavar="S", min=0, max=2**63 - 1, help="Random seed.")] = 0,
    device: flags.RunDevice = "auto",
    dtype: flags.RunDType = "auto",
    trust_remote_code: flags.TrustRemoteCode = False,
    json: flags.Json = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = 0,
) -> None:
    """Continue a text, or chat.

    Text goes to stdout as it comes, then speed and memory to stderr. Packed layers stay packed. In a conversation
    /reset forgets what was said, Ctrl-D ends it.
    """
    with Session(json=json, quiet=quiet, verbose=verbose, memory_hint="--dtype bfloat16 takes less memory") as session:
        for flag, given in {"system": system, "chat-template": chat_template}.items():
            if given is not None and not chat:
                raise UsageError(f"--{flag} needs --chat")
        if not temperature < float("inf"):
            raise UsageError(f"--temperature: {temperature} is not a finite number")
        if not 0 < top_p <= 1:
            raise UsageError(f"--top-p: {top_p} is not above 0 and at most 1")
        if top_p < 1 and temperature == 0:
            raise UsageError("--top-p needs a temperature", hint="--temperature 1")
        converse = chat and prompt is None and sys.stdin.isatty()
        if converse and json:
            raise UsageError("--json needs a prompt", hint="--prompt TEXT, or stdin")
        if not converse and prompt is None:
            prompt = _read_stdin()

        import torch

        from qcli.inference import generate as generation
        from qcli.inference.load import backend_counts, load_model, tensor_bytes
        from qcli.inference.prompt import Prompts
        from qcli.inference.served import own_dtype
        from qcli.models.open import open_source
        from qcli.utils.device import resolve_device, resolve_dtype
        from qcli.utils.memory import peak_memory
        from qcli.utils.trust import Trust

        on = resolve_device(device)
        source = open_source(model, Trust(remote_code=trust_remote_code))
        computed_in = resolve_dtype(dtype, own_dtype(source, on))
        prompts = Prompts(source, chat_template)
        history: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        if chat:
            prompts.require_template()
        tokens: list[int] = []
        if prompt is not None:
            tokens = prompts.chat([*history, {"role": "user", "content": prompt}]) if chat else prompts.text(prompt)
            generation.require_fit(tokens, source)
        ends = prompts.ends(chat=chat)
        loaded = load_model(source, on, computed_in, session.progress)
        generator = generation.Generator(source, loaded, prompts.tokenizer, ends)
        sampling = generation.Sampling(max_new_tokens, temperature, top_p, seed)

        def answer(tokens: list[int]) -> "Generation":
            with session.stream() as emit:
                result = generator.generate(tokens, sampling, emit)
            session.note(_speed(result, tensor_bytes(loaded), peak_memory(on)))
            return result

        if converse:
            session.stop_progress()
            _converse(session, history, prompts.chat, answer)
            return
        if not json:
            answer(tokens)
            return
        result = generator.generate(tokens, sampling, lambda _: None)
        session.result(
            {
                "model": model,
                "prompt_tokens": result.prompt_tokens,
                "text": result.text,
                "tokens": result.tokens,
                "stopped": result.stopped,
                "tokens_per_second": result.tokens_per_second,
                "first_token_seconds": result.first_seconds,
                "memory": {"tensors": tensor_bytes(loaded), "peak": peak_memory(on)},
                "backends": backend_counts(loaded, on, computed_in),
                "device": str(on),
                "dtype": str(computed_in).removeprefix("torch."),
                "threads": torch.get_num_threads(),
            }
        )


def _read_stdin() -> str:
    """All of stdin, without the newline at its end."""
    if sys.stdin.isatty():
        raise UsageError("no prompt", hint="--prompt TEXT, text on stdin, or --chat for a conversation")
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError:
        raise UsageError("stdin is not valid UTF-8") from None


def _converse(
    session: Session,
    system: "list[Message]",
    tokens_of: "Callable[[list[Message]], list[int]]",
    answer: "Callable[[list[int]], Generation]",
) -> None:
    """Turns on the terminal until its end of input; what a turn cannot take is reported, and the turn forgotten."""
    history = [*system]
    while (line := _ask()) is not None:
        if line.strip() == _RESET:
            history = [*system]
            session.note("forgotten")
        elif line.strip():
            turn = [*history, {"role": "user", "content": line}]
            try:
                text = answer(tokens_of(turn)).text
            except UsageError as error:
                show_error(error.message, hint=f"{_RESET} begins a new conversation")
                continue
            history = [*turn, {"role": "assistant", "content": text}]


def _ask() -> str | None:
    """A line of the terminal; None: its end of input."""
    try:
        return input("> ")
    except EOFError:
        print()
        return None
    except UnicodeDecodeError:
        raise UsageError("the input is not valid UTF-8") from None


def _speed(result: "Generation", tensors: int, peak: dict[str, int]) -> str:
    rate = result.tokens_per_second
    parts = [
        f"{len(result.tokens)} tokens",
        *([] if rate is None else [f"{rate:.1f} tokens/s"]),
        f"first after {result.first_seconds:.2f} s",
        f"weights {size(tensors)}",
        *(f"peak {size(count)} {kind}" for kind, count in peak.items()),
    ]
    why = {"length": "; --max-new-tokens reached", "context": "; the model's context is full"}
    return ", ".join(parts) + why.get(result.stopped, "")
