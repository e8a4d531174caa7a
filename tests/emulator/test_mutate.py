"""The planted-bug generator: finds each site once, changes nothing else, keeps the line numbers."""

import mutate
import pytest

PTX = """\
.version 9.0
.target sm_90a
.address_size 64
.visible .entry first(
	.param .u64 first_param_0
)
{
	.reg .pred 	%p<9>;
	.reg .b32 	%r<99>;
	.loc	1 10 3
	mbarrier.init.shared::cta.b64 [%r1], 1;
	fence.mbarrier_init.release.cluster;  // a comment: bar.sync 3;
	bar.sync 	0;
$L__BB0_1:
	.loc	1 40 5
	.loc	2 7 9, function_name $L__info_string0, inlined_at 1 40 5
	{
.reg .pred p;
mbarrier.try_wait.parity.shared::cta.b64 p, [%r374], %r373;
selp.u32 %r4, 1, 0, p;
}
	@%p1 bra $L__BB0_1;
	.loc	1 50 5
	mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r5+8], %r6;
	cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r7], [%rd1, {%r8, %r9}], [%r5+8];
	@p mbarrier.arrive.shared::cta.b64 %rd7, [%r655];
	@!p bar.arrive 	%r10, 256;
	wgmma.fence.sync.aligned;
	wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16
{%f1, %f2, %f3, %f4,
%f5, %f6, %f7, %f8}, %rd45, %rd46,
p, 1, 1, 0, 0;
	wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%f1, %f2, %f3, %f4, %f5, %f6, %f7, %f8}, {%r1, %r2, %r3, %r4}, %rd47, p, 1, 1, 0;
	wgmma.commit_group.sync.aligned;
	wgmma.wait_group.sync.aligned 1;
	.loc	3 8 1
	setp.lt.s32 %p3, %r1, %r2;
	setp.gt.s32 %p4, %r1, %r2;
	.loc	1 60 1
	setp.lt.s32 %p3, %r1, %r2;
	fence.proxy.async.shared::cta;
	cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%rd3], [%r3], 512;
	cp.async.bulk.commit_group;
	cp.async.bulk.wait_group 0;
	cp.async.bulk.wait_group.read 1;
	red.release.gpu.global.add.s32 [%rd9], 1;
	setmaxnreg.inc.sync.aligned.u32 240;
	bar.warp.sync 	-1;
	ret;
}
.visible .entry second()
{
	bar.sync 1, 128;
	cp.async.commit_group;
	cp.async.wait_group 2;
	ret;
}
	.file	1 "/somewhere/fwd.cuh"
	.file	2 "/somewhere/pipeline.cuh"
	.file	3 "/somewhere/masks.cuh"
"""  # noqa: E501


def edited_line(kind, index=0, kernel="first"):
    """The only line (or lines) that one edit changes."""
    (site,) = [s for s in mutate.sites(PTX, kernel, [kind]) if s.index == index]
    old, new = PTX.splitlines(), mutate.apply(PTX, site).splitlines()
    assert len(old) == len(new)
    changed = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    assert changed and changed[0] == site.ptx_line - 1
    return "\n".join(new[i].strip() for i in changed).strip()


@pytest.mark.parametrize(
    ("kind", "index", "expected"),
    [
        ("skip_wait", 0, "setp.eq.u32 p, 0, 0;"),
        (
            "flip_parity",
            0,
            "{ .reg .b32 planted; xor.b32 planted, %r373, 1; mbarrier.try_wait.parity.shared::cta.b64 p, [%r374], planted; }",
        ),
        ("wrong_barrier", 0, "mbarrier.try_wait.parity.shared::cta.b64 p, [%r374+8], %r373;"),
        ("wrong_barrier", 1, "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r5+16], %r6;"),
        ("wrong_barrier", 3, "@p mbarrier.arrive.shared::cta.b64 %rd7, [%r655+8];"),
        ("drop_arrive", 0, ""),
        ("drop_arrive", 1, "@p mov.b64 %rd7, 0;"),
        (
            "expect_less",
            0,
            "{ .reg .b32 planted; sub.s32 planted, %r6, 16; mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r5+8], planted; }",
        ),
        ("drop_barrier", 0, ""),
        ("drop_barrier", 1, ""),
        ("drop_warp_sync", 0, ""),
        ("drop_fence", 1, ""),
        ("drop_wgmma_fence", 0, ""),
        ("raise_wgmma_wait", 0, "wgmma.wait_group.sync.aligned 2;"),
        ("drop_commit", 1, ""),
        ("raise_copy_wait", 0, "cp.async.bulk.wait_group 1;"),
        ("weaken_copy_wait", 0, "cp.async.bulk.wait_group.read 0;"),
        ("weaken_atomic", 0, "red.relaxed.gpu.global.add.s32 [%rd9], 1;"),
        ("raise_registers", 0, "setmaxnreg.inc.sync.aligned.u32 248;"),
        ("mask_edge", 0, "setp.le.s32 %p3, %r1, %r2;"),
    ],
)
def test_edit(kind, index, expected):
    assert edited_line(kind, index).split(";  //")[0] == expected


def test_drop_keeps_what_follows_on_the_line():
    assert edited_line("drop_fence", 0) == "// a comment: bar.sync 3;"


def test_wgmma_over_several_lines():
    swapped = edited_line("swap_rows")
    assert "{%f3, %f2, %f1, %f4, %f5, %f6, %f7, %f8}" in swapped
    swizzle = edited_line("wrong_swizzle")
    assert "xor.b64 planted, %rd45, -4611686018427387904;" in swizzle
    assert "planted, %rd46" in swizzle


def test_one_wgmma_of_a_chain_stands_for_all():
    assert len(mutate.sites(PTX, "first", ["swap_rows"])) == 1


def test_a_mask_edge_once_for_each_place():
    assert [s.source for s in mutate.sites(PTX, "first", ["mask_edge"])] == [("masks.cuh:8",)]


def test_counts():
    expected = {"skip_wait": 1, "drop_arrive": 2, "drop_barrier": 2, "drop_fence": 2, "drop_commit": 2, "drop_copy": 2}
    for kind, count in expected.items():
        assert len(mutate.sites(PTX, "first", [kind])) == count, kind
    assert [s.id for s in mutate.sites(PTX, "second")] == [
        "second/drop_barrier/0",
        "second/drop_commit/0",
        "second/drop_copy_wait/0",
        "second/raise_copy_wait/0",
    ]


def test_ids_are_unique_and_do_not_depend_on_the_selection():
    everything = mutate.sites(PTX)
    assert len({s.id for s in everything}) == len(everything)
    by_id = {s.id: s for s in everything}
    for kind in mutate.KINDS:
        for site in mutate.sites(PTX, kinds=[kind]):
            assert by_id[site.id] == site


def test_every_kind_is_exercised():
    assert {s.kind for s in mutate.sites(PTX)} == set(mutate.KINDS)


def test_source_lines():
    (wait,) = mutate.sites(PTX, "first", ["skip_wait"])
    assert wait.source == ("pipeline.cuh:7", "fwd.cuh:40")
    assert wait.ptx_line == 19
    assert mutate.sites(PTX, "second", ["drop_barrier"])[0].source == ()


def test_bad_requests():
    with pytest.raises(ValueError, match="unknown kinds"):
        mutate.sites(PTX, kinds=["typo"])
    with pytest.raises(ValueError, match="no kernel third"):
        mutate.sites(PTX, "third")
    with pytest.raises(ValueError, match="does not end"):
        mutate.sites(PTX[: PTX.index("second()") + 12])
