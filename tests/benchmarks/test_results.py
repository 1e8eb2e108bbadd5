"""What the benchmarks print and write."""

import json

import jax

from benchmarks import results
from benchmarks.harness import Figures, tabulate


def example_table():
    return tabulate("(2, 8) float32", {"copy": (0.001, 0.002), "sort": (2.0, 4.0)}, baseline="copy", items=6)


def test_markdown_is_aligned_and_leaves_out_columns_without_figures():
    lines = results.markdown(example_table()).splitlines()
    assert lines[0].split("|")[1:-1] == [
        " (2, 8) float32 ", " median ", " IQR      ", " x copy  ", " rows/s "
    ]  # fmt: skip
    assert lines[2].split("|")[1:-1] == [
        " copy           ", " 1.5 ms ", " 500.0 us ", " 1.00    ", " 4,000  "
    ]  # fmt: skip
    assert len({len(line) for line in lines}) == 1


def test_durations_are_in_a_readable_unit():
    assert [results.duration(s) for s in (12.0, 0.0123, 4.56e-5)] == ["12.00 s", "12.3 ms", "45.6 us"]


def test_save_writes_the_machine_and_every_sample(tmp_path):
    path = results.save("example", [example_table()], rates={"copy B/s": 2e9}, root=tmp_path)
    assert path == tmp_path / results.device_name() / "example.json"
    assert [file.name for file in path.parent.iterdir()] == ["example.json"]
    content = json.loads(path.read_text())
    assert content["machine"]["jax"] == jax.__version__
    assert content["rates"] == {"copy B/s": 2e9}
    sort = content["tables"][0]["rows"][1]
    assert (sort["name"], sort["median"], sort["seconds"]) == ("sort", 3.0, [2.0, 4.0])
    assert sort["interquartile_range"] == 1.0
    assert sort["items_per_second"] == 2.0


def test_publish_prints_rates_in_their_unit_and_the_table(tmp_path, capsys):
    results.publish("example", [example_table()], rates={"copy B/s": 2.5e10}, root=tmp_path)
    printed = capsys.readouterr().out
    assert "copy: 25.0 GB/s" in printed
    assert results.markdown(example_table()) in printed


def test_figures_are_printed_in_columns_and_written_as_they_are(tmp_path, capsys):
    figures = Figures("Left out", ({"who": "sort", "M": 3072, "s": 1.25}, {"who": "all", "M": 5, "s": 12345.0}))
    path = results.publish("example", [], figures=[figures], root=tmp_path)
    assert json.loads(path.read_text())["figures"] == [
        {"title": "Left out", "rows": [dict(row) for row in figures.rows]}
    ]
    lines = results.markdown_of_figures(figures).splitlines()
    assert lines[0] == "Left out"
    assert lines[4].split("|")[1:-1] == [" sort ", " 3,072 ", " 1.2      "]
    assert lines[5].split("|")[1:-1] == [" all  ", " 5     ", " 12,345.0 "]
    assert lines[2] in capsys.readouterr().out


def test_device_name_is_a_folder_name():
    assert results.device_name() == results.device_name().strip("-").lower()
    assert "/" not in results.device_name()
    assert results.device_name().endswith(f"{results.cpu_cores()}-cores")
