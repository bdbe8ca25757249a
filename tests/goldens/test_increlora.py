"""IncreLoRA against its card: the score, growth without a jump, the total, the reserve, and what a new rank's first steps are."""

from __future__ import annotations

import math

import pytest
import torch

import intarsia as ia
from intarsia.allocators import reallocate
from intarsia.forms import carried
from intarsia.methods import Increlora
from small import SITES, layer_of, small_net, some_input, some_loss, state_of, trained


def _run(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int, steps: int
) -> dict[int, dict[str, int]]:
    found = {}
    for step in range(first, last + 1):
        optimizer.zero_grad()
        some_loss(model, some_input(seed=step)).backward()
        optimizer.step()
        if counts := reallocate(model, "default", step, steps):
            found[step] = dict(counts)
    return found


def _grown(
    method: Increlora, steps: int = 40, dtype: torch.dtype = torch.float32
) -> tuple[torch.nn.Module, dict[int, dict[str, int]]]:
    model = small_net(dtype)
    ia.attach(model, method)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)
    found = {}
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        some_loss(model, some_input(dtype, seed=step)).backward()
        optimizer.step()
        if counts := reallocate(model, "default", step, steps):
            found[step] = dict(counts)
    return model, found


def test_it_starts_as_the_base_and_the_reserve_is_hardly_seen():
    model, base = small_net(torch.float64), small_net(torch.float64)
    ia.attach(model, Increlora(target=4, alpha=16.0))
    x = some_input(torch.float64)
    assert torch.equal(model(x), base(x))
    reallocate(model, "default", 1, 100)
    for site in SITES:
        state = state_of(model, site)
        assert (int(state.count), int(state.reserve)) == (1, 2)
        assert state.lam.tolist() == [0.0, 1e-5, 1e-5, *[0.0] * 13]
        delta = state.method.delta(state.raw()).detach()
        bound = 4 * 1e-5 * 2 * float(state.A.detach().abs().max() * state.B.detach().abs().max())  # s lam q |B| |A|
        assert 0 < float(delta.abs().max()) <= bound < 1e-6
    assert torch.equal(model.eval()(x), base(x))  # in eval mode only what is in use acts


def test_the_score_of_a_linear_loss():
    """L = <C, dW>, so G = C: S = sum |dW * C| / sqrt(O I)."""
    model = torch.nn.Sequential(torch.nn.Linear(16, 24, bias=False)).double()
    ia.attach(model, Increlora(target=3), targets="0")
    state = state_of(model, "0")
    with torch.no_grad():
        state.lam[0] = 0.7
    C = torch.randn(24, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (model(torch.eye(16, dtype=torch.float64)).T * C).sum().backward()
    found = carried(state.note)
    assert found is not None
    expected = (state.method.delta(state.raw()).detach() * C).abs().sum() / math.sqrt(24 * 16)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    optimizer = torch.optim.SGD(trained(model), lr=0.0)
    optimizer.step()
    I = 0.15 * float(expected)
    assert float(state.importance) == pytest.approx(I, rel=1e-10)
    assert float(state.spread) == pytest.approx(
        0.15 * (float(expected) - I), rel=1e-10
    )  # from the mean after this step
    assert state.method.score(state) == pytest.approx(I * 0.15 * (float(expected) - I), rel=1e-10)
    assert state.note.grad is None
    optimizer.zero_grad()
    (model(torch.eye(16, dtype=torch.float64)).T * C).sum().backward()
    optimizer.step()
    second = 0.85 * I + 0.15 * float(expected)
    assert float(state.importance) == pytest.approx(second, rel=1e-10)
    spread = 0.85 * 0.15 * (float(expected) - I) + 0.15 * (float(expected) - second)
    assert float(state.spread) == pytest.approx(spread, rel=1e-10)


@pytest.mark.parametrize(("scaling", "kept"), [("fixed", 1.0), ("by_rank", (2 + 1e-5) / (5 + 1e-5))])
def test_growth_does_to_the_update_what_it_says(scaling, kept):
    """From 2 ranks to 5 in one round: the update stays, or shrinks to R / (R + added); the new ranks come in at 1e-5."""
    model = small_net(torch.float64)
    ia.attach(model, Increlora(target=6, cap=7, scaling=scaling, top=1, warm=0), targets="up")
    state = state_of(model, "up")
    state.count.fill_(2)
    with torch.no_grad():
        state.lam[:2] = torch.tensor([1.0, -0.5], dtype=torch.float64)
        state.method.lay_in(state, 3)
    model.eval()
    before = state.method.delta(state.raw()).detach()
    with torch.no_grad():
        assert state.method._round({"up": state.raw()}, {"up": 2}, 6)
    assert int(state.count) == 5
    after = state.method.delta(state.raw()).detach()
    s = 16 / 6 if scaling == "fixed" else 16 / 5
    assert float((after - kept * before).abs().max()) <= s * 1e-5 * 3 * float(
        state.A.detach().abs().max() * state.B.detach().abs().max()
    )
    assert float(before.abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("method", "rounds"),
    [
        (Increlora(target=2, top=1), 3),
        (Increlora(target=4, top=2), 3),  # 9 ranks in rounds of 4: the last one is cut
        (Increlora(target=4, cap=5, top=1), 5),  # at most 5 a weight
        (Increlora(target=3, top=3, warmup=0.0, until=0.0), 2),
    ],
    ids=["ones", "cut", "capped", "at once"],
)
def test_the_ranks_add_up_to_the_target(method, rounds):
    model, found = _grown(method)
    counts = {site: int(state_of(model, site).count) for site in SITES}
    assert sum(counts.values()) == 3 * method.target
    assert found[40] == counts
    assert max(counts.values()) <= method.room((24, 16))
    growths = [
        step
        for step, one in found.items()
        if sum(one.values()) > max([3, *(sum(b.values()) for s, b in found.items() if s < step)])
    ]
    assert len(growths) <= rounds
    assert not growths or (growths[0] >= method.warmup * 40 and growths[-1] <= max(1, math.ceil(method.until * 40)))
    for site in SITES:
        state = state_of(model, site)
        assert int(state.reserve) == 0
        R = counts[site]
        with torch.no_grad():
            trained_delta = state.method.delta(state.raw())
            state.lam[R:] = 5.0  # behind what is in use: nothing
            assert torch.equal(state.method.delta(state.raw()), trained_delta)
        edit = ia.export(model).edits[f"{site}.weight"]
        assert edit.tensors()["A"].shape[0] == R
        assert (
            int(torch.linalg.matrix_rank(edit.delta(torch.zeros(24, 16) if site != "down" else torch.zeros(16, 24))))
            <= R
        )


def test_the_plain_lora_that_comes_of_it_gives_the_same_output(tmp_path):
    model, _ = _grown(Increlora(target=3, top=1))
    ia.save(model, tmp_path / "a")
    other = small_net()
    deck = ia.Deck(other)
    deck.add(tmp_path / "a")
    deck.use("a")
    torch.testing.assert_close(other(some_input()), model.eval()(some_input()), rtol=1e-5, atol=1e-6)
    deck.off()
    loaded = small_net().eval()
    ia.load(loaded, tmp_path / "a")
    torch.testing.assert_close(loaded(some_input()), model(some_input()), rtol=1e-6, atol=1e-6)
    assert [int(state_of(loaded, s, "a").count) for s in SITES] == [int(state_of(model, s).count) for s in SITES]


def test_rank_goes_to_the_weights_with_the_highest_scores():
    model = small_net()
    ia.attach(model, Increlora(target=2, top=1, warmup=0.0, until=0.0))
    for site, importance in zip(SITES, (0.1, 3.0, 0.2), strict=True):
        state_of(model, site).importance.fill_(importance)
        state_of(model, site).spread.fill_(1.0)
    assert reallocate(model, "default", 1, 10) == {"up": 1, "down": 4, "again": 1}


def test_what_waits_stays_and_what_is_new_begins_slowly():
    """Weight decay and moments do not move what is not in use; of a new rank's steps the first is 1 / (warm + 1) of the optimizer's."""
    model = small_net(torch.float64)
    ia.attach(model, Increlora(target=2, cap=6, warm=3, orthogonal=0.0), targets="up")
    state = state_of(model, "up")
    reallocate(model, "default", 1, 100)
    optimizer = torch.optim.SGD(trained(model), lr=1.0, weight_decay=0.5)

    def step() -> dict[str, torch.Tensor]:
        before = {k: getattr(state, k).detach().clone() for k in ("A", "B", "lam")}
        optimizer.zero_grad()
        some_loss(model, some_input(torch.float64)).backward()
        gradient = {k: getattr(state, k).grad.clone() for k in before}
        optimizer.step()
        moved = {k: (getattr(state, k).detach() - before[k]) / -(gradient[k] + 0.5 * before[k]) for k in before}
        return {k: share.nan_to_num(0.0) for k, share in moved.items()}  # lam of what waits is 0, and has no gradient

    pace = step()  # one in use, one in reserve, four that wait
    torch.testing.assert_close(pace["A"][:2], torch.ones(2, 16, dtype=torch.float64))
    assert not pace["A"][2:].any()
    assert not pace["B"][:, 2:].any()
    assert not pace["lam"][1:].any()
    assert float(pace["lam"][0]) == pytest.approx(1.0)
    with torch.no_grad():
        state.method._round({"up": state.raw()}, {"up": 1}, 2)
    for share in (0.25, 0.5, 0.75, 1.0, 1.0):
        pace = step()
        torch.testing.assert_close(pace["A"][1], torch.full((16,), share, dtype=torch.float64))
        assert float(pace["lam"][1]) == pytest.approx(share)
        torch.testing.assert_close(pace["A"][0], torch.ones(16, dtype=torch.float64))


def test_the_penalty_is_the_mean_over_the_weights_of_what_is_off_orthogonal():
    model = small_net(torch.float64)
    ia.attach(model, Increlora(target=2, orthogonal=0.3))
    reallocate(model, "default", 1, 100)
    total = 0.0
    for site in SITES:
        state = state_of(model, site)
        A, B = state.A[:2].detach(), state.B[:, :2].detach()  # in use, and the reserve
        eye = torch.eye(2, dtype=torch.float64)
        expected = 0.3 / 3 * float((A @ A.T - eye).norm() + (B.T @ B - eye).norm())
        assert float(state.method.penalty(state.raw()).detach()) == pytest.approx(expected, rel=1e-10)
        total += expected
    assert total > 0.1
    assert Increlora(orthogonal=0.0).penalty(None) is None


def test_a_resumed_run_grows_as_the_run_itself():
    whole, half, again = (small_net() for _ in range(3))
    optimizers = []
    for model in (whole, half, again):
        ia.attach(model, Increlora(target=3, top=1, warm=4))
        optimizers.append(torch.optim.AdamW(trained(model), lr=1e-2))
    _run(whole, optimizers[0], 1, 30, 30)
    _run(half, optimizers[1], 1, 11, 30)
    assert sum(int(state_of(half, site).count) for site in SITES) in range(4, 9)
    ia.load_adapter_state(again, "default", {k: t.clone() for k, t in ia.adapter_state(half, "default").items()})
    optimizers[2].load_state_dict(optimizers[1].state_dict())
    _run(again, optimizers[2], 12, 30, 30)
    mine, theirs = ia.adapter_state(whole, "default"), ia.adapter_state(again, "default")
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert layer_of(again, "up").active == ("default",)
