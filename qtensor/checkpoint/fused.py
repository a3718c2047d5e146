"""Which matrices servers keep as one, and what that and the forms on disk ask of their shapes."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import CheckpointError
from ..schemes.scheme import Scheme

# Matrices that serving systems keep as one. Per tensor they share a scale; per block each but the last has to end on
# a block's border.
FUSED: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)


def fused_group(module: str) -> tuple[str, ...]:
    """The modules that are kept as one matrix with this one, in order, itself included."""
    parent, _, leaf = module.rpartition(".")
    for group in FUSED:
        if leaf in group:
            return tuple(f"{parent}.{name}" if parent else name for name in group)
    return (module,)


def refuse_misaligned(rows: Mapping[str, int], schemes: Mapping[str, Scheme]) -> None:
    """Blocks of fused matrices are those of their parts only if the parts end on block borders.

    rows: of every quantized module. Raises CheckpointError that names those that do not.
    """
    bad = []
    for module, scheme in schemes.items():
        group = [name for name in fused_group(module) if name in schemes]
        if scheme.format.granularity == "block" and module in group[:-1] and rows[module] % scheme.format.block[0]:
            bad.append(f"{module} has {rows[module]} rows")
    if bad:
        shown = "; ".join(bad[:5]) + (f"; and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise CheckpointError(
            f"{shown}: not a multiple of 128, so its 128 × 128 blocks are not those of the fused matrix that servers "
            "build of it. Add it and its partners to `ignore`, or use fp8_per_channel."
        )


def refuse_short_groups(cols: Mapping[str, int], schemes: Mapping[str, Scheme]) -> None:
    """Formats on disk have no short last group, nor an odd element.

    cols: K of every quantized module. Raises CheckpointError that names those whose K is no multiple of the group.
    """
    for module, scheme in schemes.items():
        fmt = scheme.format
        if fmt.granularity == "group" and cols[module] % fmt.block[1]:
            raise CheckpointError(
                f"{module} has {cols[module]} columns: {scheme.name} is stored in groups of {fmt.block[1]}, and "
                "compressed-tensors has no short ones. Add it to `ignore`, or use fp8_per_channel or int8_per_channel."
            )
