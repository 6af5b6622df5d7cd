"""Compare the guidance terms and the scalings of their targets on a validation split of the prepared data set.

The choices in params.yaml come from this table, never from the test set: `train_fl.evaluate_on: validation` holds out
a stratified fifth of the training images. The benchmark trains every variant on every partition and seed through the
command line, and prints mean and standard deviation of accuracy over seeds (see `pipeline.accuracy`), then a JSON line.

    python benchmarks/ablation.py --partition dir005 --partition dir05 --seed 0 --seed 1 --seed 2
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from ruamel.yaml import YAML

from pipeline import accuracy, provenance

OFF = {"tdcl_weight": 0.0, "ndcr_weight": 0.0}
TDCL_RAW: dict[str, Any] = {"ndcr_weight": 0.0, "tdcl_targets": "raw"}
VARIANTS: dict[str, dict[str, Any]] = {
    "fedavg": OFF,
    "tdcl, raw": TDCL_RAW,
    "tdcl, centred": {"ndcr_weight": 0.0, "tdcl_targets": "centred"},
    "tdcl, standardised": {"ndcr_weight": 0.0, "tdcl_targets": "standardised"},
    "tdcl, raw, temperature 0.01": TDCL_RAW | {"temperature": 0.01},
    "tdcl, raw, temperature 0.1": TDCL_RAW | {"temperature": 0.1},
    "tdcl, raw, U per representation": TDCL_RAW | {"tdcl_normalisation": "representation"},
    "ndcr, raw": {"tdcl_weight": 0.0, "ndcr_targets": "raw"},
    "ndcr, centred": {"tdcl_weight": 0.0, "ndcr_targets": "centred"},
    "ndcr, standardised": {"tdcl_weight": 0.0, "ndcr_targets": "standardised"},
    "both, raw + raw": {"tdcl_targets": "raw", "ndcr_targets": "raw"},
    "both, raw + standardised": {"tdcl_targets": "raw", "ndcr_targets": "standardised"},
    "both, standardised + standardised": {"tdcl_targets": "standardised", "ndcr_targets": "standardised"},
}


@click.command()
@click.option("--project", type=click.Path(path_type=Path, exists=True), default=".", help="Holds params.yaml, data/.")
@click.option("--partition", "partitions", multiple=True, default=["dir005", "dir05"], help="Repeatable.")
@click.option("--seed", "seeds", type=int, multiple=True, default=[0, 1, 2], help="Repeatable.")
@click.option("--variant", "variants", multiple=True, help="Only these rows of the table; repeatable.")
def main(project: Path, partitions: list[str], seeds: list[int], variants: list[str]) -> None:
    """Train every variant and print the table."""
    chosen = {name: VARIANTS[name] for name in variants or VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        names = _write_project(project, root, chosen)
        table = {
            variant: {p: [_train(root, names[variant], p, seed) for seed in seeds] for p in partitions}
            for variant in chosen
        }
    width = max(map(len, table))
    click.echo(f"{'validation accuracy, %':<{width}}  " + "  ".join(f"{p:>14}" for p in partitions))
    for variant, by_partition in table.items():
        cells = [accuracy.in_percent(a) for a in by_partition.values()]
        click.echo(f"{variant:<{width}}  " + "  ".join(f"{cell:>14}" for cell in cells))
    click.echo(json.dumps({"seeds": list(seeds), "accuracy": table, "provenance": provenance.describe()}))


def _write_project(project: Path, root: Path, chosen: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Copy params.yaml, add one method per variant, link the data; return variant -> name of its method."""
    yaml = YAML()
    params = yaml.load((project / "params.yaml").read_text(encoding="utf-8"))
    guided = dict(params["methods"]["feddifrc"]) | {"tdcl_weight": 1.0, "ndcr_weight": 1.0}
    names = {variant: f"variant-{number}" for number, variant in enumerate(chosen)}
    for variant, changes in chosen.items():
        plain = {"algorithm": "fedavg"}
        params["methods"][names[variant]] = plain if changes is OFF else guided | changes
    params["train_fl"]["evaluate_on"] = "validation"
    with (root / "params.yaml").open("w", encoding="utf-8") as stream:
        yaml.dump(params, stream)
    (root / "data").symlink_to((project / "data").resolve())
    return names


def _train(root: Path, method: str, partition: str, seed: int) -> float:
    command = [sys.executable, "-m", "pipeline", "--params", str(root / "params.yaml"), "--quiet", "train-fl"]
    command += ["--method", method, "--partition", partition, "--seed", str(seed)]
    path = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    return json.loads((Path(path) / "metrics.json").read_text(encoding="utf-8"))["mean_last5_accuracy"]


if __name__ == "__main__":
    main()
