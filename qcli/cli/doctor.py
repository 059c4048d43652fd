"""`qcli doctor`."""

from typing import Any

from qcli.cli import _flags as flags
from qcli.cli.ui.session import Session
from qcli.cli.ui.tables import Tables, size


def doctor(json: flags.Json = False, quiet: flags.Quiet = False, verbose: flags.Verbose = 0) -> None:
    """Describe this machine and installation.

    Versions, devices, memory, disk, missing packages, and what computes packed layers; the kernels for this CPU are
    built if they are not yet."""
    with Session(json=json, quiet=quiet, verbose=verbose) as session:
        from qcli.inference import backend
        from qcli.utils.environment import examine

        session.result({**examine(), "backends": backend.examine()}, show)


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
        ("package", "version", "needed"),
        [(p["name"], p["version"] or "missing", p["needed"]) for p in report["packages"]],
    )
