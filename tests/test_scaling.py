"""Points from results, the prediction of the largest size, and what cannot be compared."""

import json

import pytest

from bipft_jax.scaling import figure, main, parameters, predict, read_points, report

SIZES = ("2x48", "3x64", "4x96", "5x128", "6x160")


def law(size):
    return 20.0 * parameters(size) ** -0.25 + 2.0


def written(directory, recipe, size, loss, seed=0, **config):
    """A finished run, as far as the report reads it."""
    keys = ("corpus_dir", "batch_size", "num_updates", "dtype", "decoder")
    last = {"loss": loss, "bits_per_byte": loss / 3}
    result = {
        "recipe": recipe,
        "size": size,
        "config": {**dict.fromkeys(keys, 1), "seed": seed, **config},
        "seeds": [{"seed": seed, "last": last}],
    }
    path = directory / f"{recipe}-{size}-{seed}.json"
    path.write_text(json.dumps(result))
    return path


@pytest.fixture
def results(tmp_path):
    """fp follows a law without noise; b158 has the same losses with a spread of seeds around it."""
    for size in SIZES:
        written(tmp_path, "bitnet_fp", size, law(size))
        for seed, change in ((0, 0.01), (1, -0.01)):
            written(tmp_path, "bitnet_b158", size, law(size) + change, seed)
    (tmp_path / "other.json").write_text("[]")
    return tmp_path


def test_matrices_are_counted_by_hand():
    assert parameters("2x48") == 2 * (4 * 48 * 48 + 3 * 48 * 128)
    assert parameters("6x160") == 6 * (4 * 160 * 160 + 3 * 160 * 424)


def test_a_law_predicts_the_largest_size(results):
    points = read_points([results])
    assert list(points) == ["bitnet_fp", "bitnet_b158"]
    exact, noisy = (predict(of_recipe) for of_recipe in points.values())
    assert exact.held_out.size == "6x160"
    assert exact.loss == pytest.approx(law("6x160"), abs=1e-5)
    assert exact.interval == pytest.approx((exact.loss, exact.loss))
    low, high = noisy.interval
    assert low < noisy.loss - 1e-3 and high > noisy.loss + 1e-3
    assert noisy.loss == pytest.approx(exact.loss, abs=1e-6)  # of the means


def test_report_and_figure(results, tmp_path, capsys):
    output = tmp_path / "scaling.png"
    main([str(results), "--output", str(output)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:3] == ["bitnet_fp", "2x48", f"{parameters('2x48'):,}"]
    assert lines[6].split()[4:7] == ["2", f"{law('2x48'):.4f}", "0.0141"]
    assert f"it has {law('6x160'):.4f}" in lines[11]
    assert output.read_bytes().startswith(b"\x89PNG")
    sizes, energies = figure(read_points([results])).axes
    assert sizes.get_xscale() == "log" and (len(sizes.lines), len(energies.lines)) == (6, 2)
    assert report({"bitnet_fp": read_points([results])["bitnet_fp"][:3]}).count("predict") == 0


def test_what_cannot_be_compared_is_refused(results, tmp_path):
    again = tmp_path / "again"
    again.mkdir()
    copy = written(again, "bitnet_fp", "2x48", 5.0)
    with pytest.raises(ValueError, match="are both seed 0 of bitnet_fp, 2x48"):
        read_points([results, copy])
    other = written(again, "bitnet_b1", "2x48", 5.0, batch_size=2)
    with pytest.raises(ValueError, match="batch_size is 2 in .* and 1 in"):
        read_points([results / "bitnet_fp-2x48-0.json", other])
    diverged = written(again, "bitnet_b1", "3x64", 5.0)
    diverged.write_text(diverged.read_text().replace('"loss": 5.0', '"loss": null'))
    with pytest.raises(ValueError, match="3x64-0.json has no finite loss"):
        read_points([diverged])
    with pytest.raises(SystemExit, match="other.json has no result.json of a decoder"):
        main([str(results / "other.json")])
