"""The Triton kernels against the reference, which tests/routing/test_dynamic.py compares with the paper."""

import itertools
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from em_examples import mean_log_ratio

from capsexp.routing.dynamic import dynamic_routing_reference

pytest.importorskip("triton", reason="Triton is not installed: it is built for Linux only")

from capsexp.ops.kernels.dynamic_triton import dynamic_backward, dynamic_forward

SHAPES = [(3, 7, 5, 4), (1, 1, 3, 2), (2, 5, 1, 3), (2, 1, 1, 1), (2, 37, 6, 5)]  # B, I, J, D
# So small that the last shape needs several tiles, and more than one program.
SMALL_TILES = "VOTES, STEPS = 1024, 2"


@pytest.fixture(scope="module")
def interpreted():
    """Calls a function of the kernels' module with Triton's interpreter.

    In a separate process: Triton chooses the interpreter at its first import, and torch may have imported it
    already; also, the interpreter does not undo its changes to Triton's language.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            small = (
                f"from capsexp.ops.kernels import dynamic_triton\nexec({SMALL_TILES!r}, vars(dynamic_triton))"
            )
            pool.submit(exec, small).result()
            yield lambda function, *arguments: pool.submit(function, *arguments).result()


def compiled(function, *arguments):
    """Calls a function of the kernels' module on the accelerator."""
    on = [
        [each.cuda() for each in argument]
        if isinstance(argument, list)
        else argument.cuda()
        if isinstance(argument, torch.Tensor)
        else argument
        for argument in arguments
    ]
    return [None if tensor is None else tensor.cpu() for tensor in function(*on)]


def random(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def example(shape, *, prior=True, bias=True, seed=0):
    """Votes, prior, bias."""
    _, children, parents, dim = shape
    return (
        random(*shape, seed=seed),
        random(children, parents, seed=seed + 1) if prior else None,
        random(parents, dim, seed=seed + 2) if bias else None,
    )


def weights_like(*results):
    """Of the random linear function whose gradients are compared."""
    return [random(*tensor.shape, seed=9).to(tensor) for tensor in results]


def plain(votes, prior, bias, *, use=(True, True), **options):
    """Poses, coupling [B, I, J]; then the gradients of the votes, and of prior and bias if there are any."""
    inputs = [
        None if tensor is None else tensor.detach().clone().requires_grad_()
        for tensor in (votes, prior, bias)
    ]
    routed = dynamic_routing_reference(inputs[0], prior=inputs[1], bias=inputs[2], **options)
    results = (routed.poses, routed.coupling)
    weights = weights_like(*results)
    loss = sum((tensor * w).sum() for tensor, w, used in zip(results, weights, use, strict=True) if used)
    tensors = [tensor for tensor in inputs if tensor is not None]
    if not loss.requires_grad:  # the coupling of a single pass without a prior
        return [tensor.detach() for tensor in results] + [torch.zeros_like(tensor) for tensor in tensors]
    return [
        *(tensor.detach() for tensor in results),
        *torch.autograd.grad(loss, tensors, materialize_grads=True),
    ]


def in_triton(run: Callable, votes, prior, bias, *, iterations, leaky, detach, use=(True, True)):
    """What `plain` returns, by the kernels."""
    by_parent = votes.transpose(1, 2).contiguous()
    passes = run(dynamic_forward, by_parent, prior, bias, iterations, leaky)
    assert len(passes) == 3 * iterations
    coupling, _, poses = passes[-3:]
    d_poses, d_coupling = weights_like(poses, coupling.transpose(1, 2))
    saved = passes[-3:] if detach else passes
    d_votes, d_prior, d_bias = run(
        dynamic_backward,
        by_parent,
        saved,
        d_poses if use[0] else None,
        d_coupling.transpose(1, 2) if use[1] else None,
        prior is not None,
    )
    assert (d_prior is None) == (prior is None)
    learned = [tensor for tensor, given in ((d_prior, prior), (d_bias, bias)) if given is not None]
    return [poses, coupling.transpose(1, 2), d_votes.transpose(1, 2), *learned]


def assert_same(run, inputs, **options):
    expected, got = plain(*inputs, **options), in_triton(run, *inputs, **options)
    for tensor, other in zip(expected, got, strict=True):
        torch.testing.assert_close(other, tensor, rtol=1e-10, atol=1e-12)


def errors(truth, got):
    return torch.tensor(
        [((tensor - exact).norm() / exact.norm()).item() for exact, tensor in zip(truth, got, strict=True)]
    )


# Whether there is a prior, a bias, leaky, detach.
CASES = list(itertools.product([False, True], repeat=4))
FEW_CASES = [CASES[0b0000], CASES[0b1110], CASES[0b1001], CASES[0b0111], CASES[0b1100]]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_values_and_gradients_are_those_of_the_reference(interpreted, shape, iterations):
    for prior, bias, leaky, detach in FEW_CASES:
        inputs = example(shape, prior=prior, bias=bias)
        assert_same(interpreted, inputs, iterations=iterations, leaky=leaky, detach=detach)


@pytest.mark.parametrize("use", [(True, False), (False, True)], ids=["poses", "coupling"])
@pytest.mark.parametrize("iterations", [1, 3])
def test_gradients_are_those_of_the_reference_whichever_result_the_loss_takes(interpreted, use, iterations):
    for learned, detach in itertools.product([False, True], [False, True]):
        inputs = example(SHAPES[0], prior=learned, bias=learned)
        assert_same(interpreted, inputs, iterations=iterations, leaky=False, detach=detach, use=use)


@pytest.mark.parametrize("leaky", [False, True])
def test_large_logits_are_no_overflow(interpreted, leaky):
    votes, prior, bias = example(SHAPES[0])
    for large in (1000 * prior, 1000 + 1000 * prior.abs(), -1000 - 1000 * prior.abs()):
        assert_same(interpreted, (votes, large, bias), iterations=2, leaky=leaky, detach=False)


def test_votes_of_zero_have_finite_gradients(interpreted):
    votes, prior, _ = example(SHAPES[0])
    got = in_triton(
        interpreted, torch.zeros_like(votes), prior, None, iterations=3, leaky=False, detach=False
    )
    assert all(tensor.isfinite().all() for tensor in got)
    assert not got[0].any()
    torch.testing.assert_close(got[1], prior.softmax(1).expand_as(got[1]))


# Over 12 draws (Xeon, AVX-512) log2 of the ratio of both errors has means of up to 0.1 and deviations of up
# to 0.35, so the mean of 3 draws is 5 deviations or more below 1: false alarms below 1e-5.
DRAWS = range(0, 30, 10)


def test_float32_error_is_at_most_twice_that_of_plain_torch(interpreted):
    options, both = {"iterations": 3, "leaky": False, "detach": False}, []
    for seed in DRAWS:
        inputs = example((2, 36, 10, 16), seed=seed)
        single = [tensor.float() for tensor in inputs]
        truth = plain(*inputs, **options)
        ours = in_triton(interpreted, *single, **options)
        both.append(torch.stack([errors(truth, plain(*single, **options)), errors(truth, ours)], 1))
    assert (mean_log_ratio(torch.stack(both), slack=1e-9) <= 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(interpreted, dtype):
    options, both = {"iterations": 3, "leaky": True, "detach": False}, []
    for seed in DRAWS:
        votes, prior, bias = example((2, 36, 10, 16), seed=seed)
        half = votes.to(dtype), prior.float(), bias.float()
        got = in_triton(interpreted, *half, **options)
        assert [tensor.dtype for tensor in got] == [torch.float32] * 2 + [dtype] + [torch.float32] * 2
        truth, single = (
            plain(*(tensor.to(exact) for tensor in half), **options)
            for exact in (torch.float64, torch.float32)
        )
        both.append(torch.stack([errors(truth, single), errors(truth, got)], 1))
    # The votes' gradient is rounded.
    slack = torch.tensor([0.0, 0.0, torch.finfo(dtype).eps, 0.0, 0.0], dtype=torch.float64) + 1e-9
    assert (mean_log_ratio(torch.stack(both), slack) <= 1).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")
@pytest.mark.parametrize("shape", [*SHAPES, (3, 1152, 10, 16)], ids=str)
@pytest.mark.parametrize("iterations", [1, 3])
def test_compiled_kernels_do_what_the_reference_does(shape, iterations):
    for prior, bias, leaky, detach in CASES:
        inputs = example(shape, prior=prior, bias=bias)
        options = {"iterations": iterations, "leaky": leaky, "detach": detach}
        assert_same(compiled, inputs, **options)
        single = [None if tensor is None else tensor.float() for tensor in inputs]
        truth = plain(*inputs, **options)
        allowed = errors(truth, plain(*single, **options))
        got = errors(truth, in_triton(compiled, *single, **options))
        assert (got <= 10 * allowed + 1e-6).all()  # shapes this small differ by a few roundings
