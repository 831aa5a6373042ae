"""Position tables at another size: the reference's numbers, and what its rules mean."""

import numpy as np
import pytest
import torch
from reference import arrays, note

from xvlm.models import resize


def window_of(table: torch.Tensor) -> int:
    return round(len(table) ** 0.5) // 2 + 1


def test_the_reference_arrays(goldens):
    folder = goldens / "load_interpolate"
    if not folder.is_dir():
        pytest.skip(f"no reference arrays in {folder}")
    given, expected = (arrays(folder / file) for file in ("inputs.npz", "outputs.npz"))
    assert given.keys() == expected.keys()
    for name, table in given.items():
        wanted = expected[name]
        if name.startswith("rel_"):
            found = resize.relative_positions(table, window_of(wanted))
        else:
            known, side = (round((positions.shape[1] - 1) ** 0.5) for positions in (table, wanted))
            found = resize.absolute_positions(table, (known, known), (side, side))
        note(folder, "arrays", name, found, wanted)
        # To the last bit of float32, which rounding in another linear algebra library may turn.
        torch.testing.assert_close(found, wanted, atol=1e-7, rtol=2e-7, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(("known", "wanted", "ratio"), [(7, 12, 1.240724), (7, 15, 1.337515), (12, 15, 1.047191)])
def test_nodes_grow_by_the_known_ratio_and_reach_the_new_border(known, wanted, ratio):
    nodes = resize.geometric_nodes(known - 1, wanted - 1)
    assert torch.equal(nodes, -nodes.flip(0))
    right = nodes[known:]
    assert right[0] == 1
    np.testing.assert_allclose(np.diff(right), ratio ** np.arange(1, known - 1), rtol=1e-5)
    assert abs(right[-1] - (wanted - 1)) < 1e-4


@pytest.mark.parametrize(("known", "wanted"), [(7, 12), (12, 15), (7, 15), (12, 7), (7, 24)])
def test_the_spline_is_scipys(known, wanted):
    interpolate = pytest.importorskip("scipy.interpolate")
    side = 2 * known - 1
    table = torch.randn(side**2, 3)
    nodes, at = resize.geometric_nodes(known - 1, wanted - 1).numpy(), np.arange(-wanted + 1, wanted)
    found = resize.relative_positions(table, wanted)
    for head in range(3):
        spline = interpolate.RectBivariateSpline(nodes, nodes, table[:, head].view(side, side).numpy())
        expected = torch.from_numpy(spline(at, at)).float().flatten()
        torch.testing.assert_close(found[:, head], expected, atol=1e-6, rtol=1e-6)


def test_a_cubic_surface_is_kept():
    nodes = resize.geometric_nodes(6, 11)
    y, x = torch.meshgrid(nodes, nodes, indexing="ij")
    table = (x**3 / 700 - x * y**2 / 900 + y).float().flatten()[:, None]
    at = torch.arange(-11.0, 12.0).clamp(-nodes[-1].item(), nodes[-1].item())
    y, x = torch.meshgrid(at, at, indexing="ij")
    expected = (x**3 / 700 - x * y**2 / 900 + y).flatten()[:, None]
    torch.testing.assert_close(resize.relative_positions(table, 12), expected, atol=1e-5, rtol=1e-5)


def test_the_same_size_changes_nothing_and_odd_tables_are_refused():
    table = torch.randn(169, 2)
    assert torch.equal(resize.relative_positions(table, 7), table)
    positions = torch.randn(1, 17, 4)
    assert torch.equal(resize.absolute_positions(positions, (4, 4), (4, 4)), positions)
    assert torch.equal(resize.absolute_positions(positions, (4, 4), (6, 6))[:, 0], positions[:, 0])
    with pytest.raises(ValueError, match="170 relative positions is not that of a square window"):
        resize.relative_positions(torch.randn(170, 2), 12)
    with pytest.raises(ValueError, match="windows of 2 are too small"):
        resize.relative_positions(torch.randn(9, 2), 4)
    with pytest.raises(ValueError, match=r"a\.pos_embed: positions of 18 patches are not those of a square grid"):
        resize.fit_tables({"a.pos_embed": torch.randn(1, 19, 4)}, {"a.pos_embed": torch.empty(1, 37, 4)})
    with pytest.raises(ValueError, match=r"a table of shape \(1, 5, 4\) holds no positions of 2 x 3 patches"):
        resize.absolute_positions(torch.randn(1, 5, 4), (2, 3), (3, 3))


@pytest.mark.parametrize("before", [0, 1, 5])
def test_positions_of_any_grid_behind_any_tokens(before):
    """What grows down the rows alone, or along the columns alone, still does."""
    y, x = torch.meshgrid(torch.arange(5.0), torch.arange(10.0), indexing="ij")  # 50: one more than a square
    table = torch.cat([torch.full((before, 2), 9.0), torch.stack([y, x], -1).flatten(0, 1)])
    for wanted in ((10, 5), (10, 20)):
        found = resize.absolute_positions(table, (5, 10), wanted)
        assert torch.equal(found[:before], table[:before])
        assert torch.equal(resize.absolute_positions(table[None], (5, 10), wanted)[0], found)
        y, x = found[before:].view(*wanted, 2).unbind(-1)
        for down, along in ((y, x), (x.T, y.T)):
            assert (down.diff(dim=0) > 0).all()
            torch.testing.assert_close(along, along[:1].expand_as(along), atol=1e-5, rtol=0)


def test_a_grid_that_is_turned_is_resized_though_its_shape_stays():
    state = {"vision.trunk.pos_embed": torch.randn(1, 7, 4), "vision.positions": torch.randn(6, 4)}
    fitted, resized = resize.fit_tables(state, state, ((2, 3), (3, 2)))
    assert resized == list(state)
    assert not any(torch.equal(fitted[name], state[name]) for name in state)
    assert resize.fit_tables(state, state, ((2, 3), (2, 3)))[1] == []
    assert resize.fit_tables(state, state, ((2, 3), (4, 3)))[1] == []  # of this shape at any size: of no grid


def test_only_tables_are_fitted_to_a_state_dict():
    state = {"a.pos_embed": torch.randn(1, 17, 4), "b.relative_position_bias_table": torch.randn(49, 2)}
    state |= {"c.weight": torch.randn(3)}
    target = {"a.pos_embed": torch.empty(1, 37, 4), "b.relative_position_bias_table": torch.empty(121, 2)}
    fitted, resized = resize.fit_tables(state, target | {"c.weight": torch.empty(5, device="meta")})
    assert resized == ["a.pos_embed", "b.relative_position_bias_table"]
    assert {name: fitted[name].shape for name in resized} == {name: target[name].shape for name in resized}
    assert fitted["c.weight"] is state["c.weight"]
