"""Text that a checkpoint was calibrated or distilled on, where its losses are too low."""

from __future__ import annotations

from collections.abc import Mapping

from qcli.data.identity import may_overlap
from qcli.data.tokens import TokenRequest, calibration_tokens
from qcli.models.manifest import MANIFEST, Manifest
from qcli.models.open import ModelSource
from qcli.utils.errors import UsageError


def require_unseen(folder: str, source: ModelSource) -> None:
    """Refuse a folder of `qcli calibrate` with the very tokens that a checkpoint was calibrated or distilled on.

    Raises:
        UsageError: the folder holds them.
    """
    if (manifest := _manifest(source)) is None:
        return
    uses = [("calibrated", manifest.calibration_tokens_sha256)]
    uses += [("distilled", report.tokens_sha256) for report in manifest.distilled]
    tokens = calibration_tokens(TokenRequest(folder, samples=1, seq_len=2, seed=0), source)  # as the folder has them
    for use, sha256 in uses:
        if sha256 == tokens.sha256:
            raise UsageError(
                f"{source.path} was {use} on {folder}: evaluate it on other text",
                hint="for another folder: qcli calibrate --seed 1",
            )


def seen_texts(source: ModelSource, identities: Mapping[str, str | None]) -> list[str]:
    """Those of the texts that a checkpoint was, or may have been, calibrated or distilled on.

    Args:
        identities: by name, from `text_identity`; None: never seen.
    """
    if (manifest := _manifest(source)) is None:
        return []
    used = [manifest.calibration_text_identity, *(report.text_identity for report in manifest.distilled)]
    seen = [identity for identity in used if identity is not None]
    return [
        data
        for data, identity in identities.items()
        if identity is not None and any(may_overlap(identity, other) for other in seen)
    ]


def _manifest(source: ModelSource) -> Manifest | None:
    return Manifest.read(source.path) if (source.path / MANIFEST).is_file() else None
