"""Whether a changed tree still writes the same bytes: python -m benchmarks.golden record | check | against TREE

Every run is a few `python -m qcli` commands in a folder of its own, on tiny random models and on stories260k. Every
file they write is hashed: JSON without times, memory and versions, other files as they are. Text for people (cards,
reports, descriptions in the schema) is hashed apart; its differences are listed and do not count. Floating-point bytes
depend on processor and libraries: on another machine than the record's use `against`, which runs this checkout and
another one and also shows where two JSON files differ.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import common
from benchmarks.golden_runs import RUNS, Run, write_inputs

HERE = Path(__file__).parents[1]
VOLATILE = {"peak_memory", "started", "modified", "versions", "resumed_blocks"}  # and keys that end in "seconds"
PROSE = {"README.md", "report.md", "report.html"}
ERROR = "error"  # in place of a file, where a command has failed
DEVICES = ("quantize", "calibrate", "distill", "eval", "run")  # commands that have --device


class Hashes(NamedTuple):
    """sha256 of files by name: those that must not change, and those that are written for people."""

    strict: dict[str, str]
    prose: dict[str, str]


class Tree:
    """A checkout whose qcli is run in the folder `work`."""

    def __init__(self, checkout: Path, work: Path, device: str | None = None) -> None:
        self.work, self.device = work, device
        path = os.pathsep.join(filter(None, [str(checkout.absolute()), os.environ.get("PYTHONPATH")]))
        self.env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.env |= {"HF_HOME": str(work / "hub")} | ({} if device else {"CUDA_VISIBLE_DEVICES": ""})
        work.mkdir(parents=True)
        question = "import importlib.util as u; print(u.find_spec('qcli').origin)"
        package = subprocess.check_output([sys.executable, "-c", question], env=self.env, cwd=work, text=True).strip()
        if not Path(package).is_relative_to(checkout.absolute()):
            raise SystemExit(f"{checkout} has no qcli: {package} would be run")
        write_inputs(work)

    def hashes(self, runs: list[Run], jobs: int) -> dict[str, Hashes]:
        """Make all runs, `jobs` at a time."""
        inputs = Hashes({}, {})
        for file in sorted(self.work.glob("*/*.safetensors")):
            inputs.strict[str(file.relative_to(self.work))] = _sha256(file.read_bytes())
        with ThreadPoolExecutor(jobs) as pool:
            return {"inputs": inputs} | dict(zip([run.name for run in runs], pool.map(self._make, runs), strict=True))

    def _make(self, run: Run) -> Hashes:
        begun, folder = time.monotonic(), self.work / run.name
        folder.mkdir()
        for name, text in run.files.items():
            (folder / name).write_text(text)
        try:
            for number, command in enumerate(run.commands, 1):
                process = self._start(folder, command)
                output, errors = process.communicate()
                if process.returncode not in (0, 4):  # 4: a gate failed
                    raise RuntimeError(f"qcli {command}: exit code {process.returncode}: {errors.decode()[-800:]}")
                kind = "json" if output.startswith(b"{") else "txt"
                (folder / f"stdout-{number}.{kind}").write_bytes(output.replace(bytes(self.work), b"WORK"))
            hashes = hashed(folder)
            if run.killed:
                shutil.move(folder / "q", self.work / f"{run.name}-straight")
                kills = self._killed(folder, run.commands[-1])
                if kills < 3 or hashed(folder) != hashes:
                    raise RuntimeError(f"after {kills} kills the result differs, or there were fewer than 3")
        except RuntimeError as error:
            hashes = Hashes({ERROR: str(error)}, {})
        print(
            f"{run.name}: {time.monotonic() - begun:.0f} s", hashes.strict.get(ERROR, ""), file=sys.stderr, flush=True
        )
        return hashes

    def _start(self, folder: Path, command: str) -> subprocess.Popen[bytes]:
        words = shlex.split(command)
        if self.device and words[0] in DEVICES:
            words += ["--device", self.device]
        elif self.device and words[0] == "study" and words[1] != "report":
            words += ["--set", f"device={self.device}"]
        env = self.env | {"QCLI_CACHE": str(self.work / "cache" / folder.name)}
        pipe = subprocess.PIPE
        return subprocess.Popen([sys.executable, "-m", "qcli", *words], cwd=folder, env=env, stdout=pipe, stderr=pipe)

    def _killed(self, folder: Path, command: str) -> int:
        """Kill a command that writes `q` at each new part and resume it, until it ends; returns the number of kills."""

        def parts() -> set[Path]:
            try:
                return {file for file in (folder / "q.partial").iterdir() if file.name.startswith("part-")}
            except FileNotFoundError:
                return set()

        kills = 0
        while not (folder / "q").exists():
            before, process = parts(), self._start(folder, command)
            while process.poll() is None and not parts() - before:
                time.sleep(0.002)
            kills += process.poll() is None
            process.kill()
            _, errors = process.communicate()
            if process.returncode not in (0, -9):
                raise RuntimeError(f"qcli {command}: exit code {process.returncode}: {errors.decode()[-800:]}")
        return kills


def hashed(folder: Path) -> Hashes:
    """Of every file below a folder, caches left out."""
    hashes = Hashes({}, {})
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        name, content = str(file.relative_to(folder)), file.read_bytes()
        if "cache" in Path(name).parts:
            continue
        if file.name in PROSE or file.suffix == ".txt":
            hashes.prose[name] = _sha256(content)
            continue
        if b'"$defs"' in content:
            hashes.prose[name] = _sha256(content)
        hashes.strict[name] = _sha256(json.dumps(stable(file)).encode() if "json" in file.suffix else content)
    return hashes


def stable(file: Path) -> Any:
    """The content of a JSON file without what differs from run to run, and without text for people."""
    lines = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
    values = [json.loads(line) for line in lines]
    return sorted((_stable(value, value.get("$defs", {})) for value in values), key=json.dumps)


def _stable(value: Any, defs: dict[str, Any]) -> Any:
    if isinstance(value, list):
        return [_stable(each, defs) for each in value]
    if not isinstance(value, dict):
        return value
    if "$ref" in value:
        return _stable(defs[value["$ref"].rpartition("/")[2]], defs)
    dropped = VOLATILE | PROSE | ({"$defs", "description", "title"} if defs else set())
    return {k: _stable(v, defs) for k, v in value.items() if k not in dropped and not k.endswith("seconds")}


def json_differences(old: Any, new: Any, place: str = "") -> Iterator[str]:
    """Where two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            yield from json_differences(old.get(key), new.get(key), f"{place}.{key}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (first, second) in enumerate(zip(old, new, strict=True)):
            yield from json_differences(first, second, f"{place}[{number}]")
    elif old != new:
        yield f"{place}: {old!r:.100} -> {new!r:.100}"


def differences(old: dict[str, Hashes], new: dict[str, Hashes], folders: tuple[Path, Path] | None = None) -> int:
    """Print what differs and return the number of differing files that should not.

    Args:
        folders: of the two results, to show where JSON files differ.
    """
    count = 0
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name, Hashes({}, {})), new.get(name, Hashes({}, {}))
        if error := after.strict.get(ERROR) or before.strict.get(ERROR):
            print(f"{name} fails: {error}")
            count += 1
            continue
        for first, second, label in ((before.strict, after.strict, ""), (before.prose, after.prose, "prose: ")):
            for file in sorted(file for file in first.keys() | second.keys() if first.get(file) != second.get(file)):
                how = "missing" if file not in second else "new" if file not in first else "differs"
                print(f"{label}{name}: {file} {how}")
                count += not label
                if how == "differs" and not label and folders is not None and "json" in Path(file).suffix:
                    both = (stable(folder / name / file) for folder in folders)
                    print("".join(f"    {place}\n" for place in [*json_differences(*both)][:5]), end="")
    return count


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("record", "check", "against"))
    parser.add_argument("tree", nargs="?", type=Path, help="with against: the other checkout, the one from before")
    parser.add_argument("--device", help="with against: given to every command that has it")
    parser.add_argument("--only", default="", metavar="PREFIX", help="runs whose names begin with PREFIX")
    parser.add_argument("--skip", metavar="PREFIX", help="leave out the runs whose names begin with PREFIX")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep what the runs write; must not exist")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at a time")
    options = parser.parse_args()
    if (options.what == "against") != (options.tree is not None) or (options.device and options.what != "against"):
        parser.error("TREE is required by against; TREE and --device go with nothing else")
    runs = [run for run in RUNS if run.name.startswith(options.only)]
    runs = [run for run in runs if options.skip is None or not run.name.startswith(options.skip)]
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.keep or Path(scratch)).absolute()

        def hashes_of(name: str, checkout: Path) -> dict[str, Hashes]:
            begun = time.monotonic()
            hashes = Tree(checkout, folder / name, options.device).hashes(runs, options.jobs)
            print(f"{name}: {len(runs)} runs, {time.monotonic() - begun:.0f} s", file=sys.stderr)
            return hashes

        if options.what == "record":
            record(hashes_of("work", HERE))
        elif options.what == "check":
            old = recorded([run.name for run in runs])
            finish(differences(old, hashes_of("work", HERE)))
        else:
            both = (folder / "before", folder / "after")
            finish(differences(hashes_of("before", options.tree), hashes_of("after", HERE), both))


def record(hashes: dict[str, Hashes]) -> None:
    """Write benchmarks/results/golden.json; runs that were not made keep their record.

    Raises:
        SystemExit: a run has failed.
    """
    failed = [name for name, files in hashes.items() if ERROR in files.strict]
    if failed:
        raise SystemExit(f"nothing recorded, these fail: {', '.join(failed)}")
    known = recorded([run.name for run in RUNS]) if len(hashes) <= len(RUNS) else {}
    strict = {name: files.strict for name, files in (known | hashes).items()}
    prose = {name: files.prose for name, files in (known | hashes).items() if files.prose}
    print(common.save("golden", {"what": __doc__, "runs": strict, "prose": prose}))


def recorded(names: list[str]) -> dict[str, Hashes]:
    """The record of these runs; warns if it was made on another machine."""
    known = json.loads((common.RESULTS / "golden.json").read_text())
    now = common.machine()
    for key in ("processor", "torch", "transformers", "python"):
        if known["machine"][key] != now[key]:
            print(f"recorded with another {key}, bytes may differ: {known['machine'][key]}, here {now[key]}")
    kept = [name for name in ("inputs", *names) if name in known["runs"]]
    return {name: Hashes(known["runs"][name], known["prose"].get(name, {})) for name in kept}


def finish(count: int) -> None:
    """Exit code 1 where files differ."""
    print(f"{count} files differ" if count else "all the same")
    raise SystemExit(1 if count else 0)


if __name__ == "__main__":
    main()
