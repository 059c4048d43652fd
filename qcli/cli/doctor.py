"""`qcli doctor`."""

from typing import Any

from qcli.cli import _flags as flags
from qcli.cli.ui.session import Session
from qcli.cli.ui.tables import Tables, size


def doctor(json: flags.Json = False, quiet: flags.Quiet = False, verbose: flags.Verbose = 0) -> None:
    """Describe this machine and installation.

    Versions, devices, memory, disk, what computes packed layers, and the packages and programs that qcli can use, with
    what each is for and how to install it. The kernels for this CPU are built if they are not yet."""
    with Session(json=json, quiet=quiet, verbose=verbose) as session:
        from qcli.inference import backend
        from qcli.utils.environment import examine

        report = examine()
        session.result({**report, "packages": [*report["packages"], _compiler()], "backends": backend.examine()}, show)


def _compiler() -> dict[str, str | None]:
    """The C++ compiler, as a package."""
    from qcli.inference.cpu.build import find_compiler
    from qcli.utils.errors import UnsupportedError

    entry = {"name": "C++ compiler", "needed": "packed layers on a CPU", "install": "apt install g++"}
    try:
        return {**entry, "version": " ".join(find_compiler())}
    except UnsupportedError:
        return {**entry, "version": None}


def show(tables: Tables, report: dict[str, Any]) -> None:
    """Versions, resources, devices and packages."""
    memory, disk = report["memory"], report["disk"]
    tables.pairs(
        {
            "qcli": report["qcli"],
            "python": report["python"],
            "platform": report["platform"],
            "transformers plug-in": report["plugin"],
            "memory": f"{size(memory['available'])} available of {size(memory['total'])}" if memory else None,
            "disk": f"{size(disk['free'])} free in {disk['path']}",
            "threads": report["threads"],
        }
    )
    tables.table(
        ("device", "name", "memory", "fast bfloat16"),
        [(d["device"], d["name"], d["memory"] and size(d["memory"]), d["bf16"]) for d in report["devices"]],
    )
    tables.table(
        ("backend", "devices", "available"),
        [(b["name"], b["devices"], f"no: {b['reason']}" if b["reason"] else "yes") for b in report["backends"]],
    )
    tables.table(
        ("package", "version", "for", "to install"),
        [
            (p["name"], p["version"] or "missing", p["needed"], "" if p["version"] else p["install"])
            for p in report["packages"]
        ],
    )
