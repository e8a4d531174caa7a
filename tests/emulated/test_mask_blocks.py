"""The kernel that reads dense masks, emulated, against the same in PyTorch."""

from __future__ import annotations

import block_mask_checks as checks
import pytest
import torch

from flash_ext import _emulator, block_mask, create_block_mask, env

KERNEL = "mask_blocks_sm90" if env.EMULATE == "sm90" else "mask_blocks_sm80"


@pytest.mark.parametrize("name", checks.RANDOM)
def test_kinds_and_bits(name: str, schedule) -> None:
    schedule("checks", sms=3)
    mask = checks.random_mask(name).flatten(0, 1)
    _emulator.reset_reports()
    kinds, bits = torch.ops.flash_ext.mask_blocks(mask)
    assert [report.kernel for report in _emulator.reports()] == [KERNEL]
    wanted_kinds, wanted_bits = block_mask.mask_blocks(mask)
    partial = wanted_kinds == block_mask.PARTIAL
    assert torch.equal(kinds, wanted_kinds) and torch.equal(bits[partial], wanted_bits[partial])


@pytest.mark.parametrize("offset", (0, 1, 2))
def test_any_alignment(offset: int, schedule) -> None:
    """Rows of 4-byte multiples are read by words where the first one lies right, and by bytes elsewhere; any byte but 0 counts."""
    schedule("late")
    octets = torch.randint(0, 256, (offset + 2 * 200 * 260,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    octets[torch.rand(len(octets)) < 0.5] = 0
    mask = octets[offset:].view(torch.bool).view(2, 200, 260)
    kinds, bits = torch.ops.flash_ext.mask_blocks(mask)
    wanted_kinds, wanted_bits = block_mask.mask_blocks(octets[offset:].view(2, 200, 260) != 0)
    assert torch.equal(kinds, wanted_kinds) and torch.equal(bits, wanted_bits)


def test_a_mask_is_built_by_it(schedule) -> None:
    schedule("plain")
    mask = checks.random_mask("half")
    _emulator.reset_reports()
    made = create_block_mask(mask, 1, 4, *mask.shape[2:])
    assert {report.kernel for report in _emulator.reports()} == {KERNEL} and torch.equal(made.to_dense(), mask)


def test_every_block_of_the_kernel_is_executed(schedule) -> None:
    schedule("plain")
    _emulator.reset_reports()
    for seqlen_k in (260, 261):
        mask = torch.zeros(1, 300, seqlen_k, dtype=torch.bool)
        mask[:, :128, :200] = True
        torch.ops.flash_ext.mask_blocks(mask)
    executed: dict[int, bool] = {}
    for report in _emulator.reports():
        for block in report.blocks:
            executed[block.first_line] = executed.get(block.first_line, False) or block.executions > 0
    assert [line for line, any_time in executed.items() if not any_time] == []
