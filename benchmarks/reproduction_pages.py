"""The tables of docs/reproduction.md and README.md, made from the summaries in benchmarks/results/reproduction.

Each page has marks, <!-- name --> and <!-- /name -->, between which the text of that name is written.
"""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import paper_numbers
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from pipeline import accuracy, plotting
from pipeline.accuracy import Gain
from pipeline.errors import PipelineError

ROOT = Path(__file__).parents[1]
SUMMARIES = ROOT / "benchmarks" / "results" / "reproduction"
PICTURE = ROOT / "docs" / "gallery" / "guide-quality.svg"
PAGES = {ROOT / "docs" / "reproduction.md": None, ROOT / "README.md": ["default"]}

Summary = dict[str, Any]
BySeed = dict[str, float]
"""Seed -> accuracy."""

_NAMES = {
    "fedavg": "FedAvg", "fedprox": "FedProx", "scaffold": "SCAFFOLD", "fednova": "FedNova", "moon": "MOON",
    "fednh": "FedNH", "fedcr": "FedCR", "feddifrc": "FedDifRC", "simsiam": "SimSiam", "feddyn": "FedDyn",
    "feddifrc-ssl": "FedDifRC without labels",
}  # fmt: skip

_GUIDANCE = {  # how the guidance of a method differs from the paper's weights of 1
    "feddifrc": "", "paper": ", weights 1", "third": ", weights 0.3", "triple": ", weights 3",
    "tenfold": ", weights 10", "thirtyfold": ", weights 30", "hundredfold": ", weights 100", "tdcl": ", TDCL alone",
    "ndcr": ", NDCR alone", "tdcl-tenfold": ", TDCL's weight 10", "ndcr-triple": ", NDCR's weight 3",
    "ndcr-tenfold": ", NDCR's weight 10", "ndcr-thirtyfold": ", NDCR's weight 30",
}  # fmt: skip

_VARIANTS = {
    "tdcl": "TDCL alone", "ndcr": "NDCR alone", "feddifrc": "both losses",
    "layer2": "layer 2 alone", "layer3": "layer 3 alone", "layer4": "layer 4 alone",
    "layers23": "layers 2 and 3", "layers24": "layers 2 and 4", "layers34": "layers 3 and 4",
    "temperature-001": "temperature 0.01 (default 0.04)", "temperature-01": "temperature 0.1",
    "temperature-05": "temperature 0.5", "tdcl-normalised": "TDCL with the normalisation U per representation",
    "tdcl-standardised": "TDCL on standardised targets (default raw)",
    "ndcr-raw": "NDCR on raw targets (default standardised)", "ndcr-kl": "NDCR as KL divergence",
}  # fmt: skip

_QUALITIES = {
    "probe": "accuracy of a linear probe, %", "margin": "margin of the matching prompt",
    "separation": "separation of prompts",
}  # fmt: skip

_WEIGHTS = {"feddifrc": "weights 1", "feddifrc-ndcr-tenfold": "NDCR's weight 10"}
"""The methods that differ in the weights of the guidance only."""

_OVER_DEFAULT = "over tiny-sd, t = 300"
"""The gain of features over the default ones, with NDCR's weight 10."""

_COMPARED_NETWORKS = {  # the networks that the linear classifiers of features are compared with
    "digits": ("digits-tuned", ["fedavg", "fedavg-feddifrc", "fedavg-ndcr-tenfold", "scaffold-ndcr-tenfold"]),
    "photographs": (
        "cifar10-guided",
        ["fedavg", "feddifrc", *(f"{method}-ndcr-tenfold" for method in ("feddifrc", "scaffold", "moon", "fedcr"))],
    ),
}

_EXPERIMENTS = {  # the first key that an experiment changes names it
    "train_fl.num_clients": "{} clients, 10 per round",
    "train_fl.imbalance_factor": "long tail, imbalance factor {}",
    "sweep.partitions": "two classes per client",
    "train_fl.clients_per_round": "{} of 10 clients per round",
}


def made() -> dict[Path, str]:
    """Return the text of every page, with all tables written between their marks, and of their picture."""
    found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(SUMMARIES.glob("*.json"))}
    pages = {PICTURE: quality_picture(found)} if _quality(found) else {}
    for page, names in PAGES.items():
        text = page.read_text(encoding="utf-8")
        for name, write in SECTIONS.items():
            if names is None or name in names:
                text = put(text, name, write(found))
        pages[page] = text
    return pages


def put(page: str, name: str, text: str) -> str:
    """Return the page with `text` between the marks of `name`."""
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    if start not in page or end not in page:
        raise PipelineError(f"The page has no marks {start.strip()} and {end}. Add them where the table belongs.")
    return page[: page.index(start) + len(start)] + text.strip() + "\n" + page[page.index(end) :]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n"


def caption(summary: Summary) -> str:
    """Describe the numbers of a summary, and where they come from."""
    seeds = _all_seeds(summary)
    words = accuracy.in_words(summary["num_rounds"], seeds)
    gains = f" Gains, in points, are {accuracy.gain_in_words(seeds)}."
    fewer = any(len(own) < len(seeds) for own in _cells(summary))
    few = "; where they are fewer, n or the seeds are given" if fewer else ""
    words = f"{words[0].upper()}{words[1:]}{few}.{gains}".replace("*", "\\*")
    cost = f"{summary['runs']} runs, {summary['hours']:.1f} hours of one core in all"
    origin = f"{cost}, on {', '.join(summary['hardware'])} beside other work"
    if "largest_difference" in summary:
        points = 100 * summary["largest_difference"]
        origin += f" (runs repeated on another differ by at most {points:.2f} points)"
    return f"{words} {origin}; torch {', '.join(summary['torch'])}; commit {', '.join(summary['commits'])}.\n"


def _cells(summary: Summary) -> list[BySeed]:
    found = [experiment["accuracies"] for experiment in summary["experiments"]]
    return [own for by_partition in found for by_method in by_partition.values() for own in by_method.values()]


def _all_seeds(summary: Summary) -> list[int]:
    return sorted({int(seed) for own in _cells(summary) for seed in own})


def gain_of(own: BySeed, other: BySeed) -> Gain | None:
    """Return the gain over the seeds that both have; None if there is none."""
    both = [seed for seed in own if seed in other]
    return accuracy.gain([own[seed] for seed in both], [other[seed] for seed in both]) if both else None


def verdict(gain: Gain, claimed: float) -> str:
    """Compare the sign of a gain with the paper's: "same sign", "other sign" or "cannot tell"."""
    if not gain.sign:
        return "cannot tell"
    return "same sign" if gain.sign == (1 if claimed > 0 else -1) else "other sign"


def _points(gain: Gain | None, most: int = 0) -> str:
    """Format a gain, with the number of seeds if it is below `most`."""
    if gain is None:
        return "–"
    count = len(gain.by_seed)
    return str(gain).replace("*", "\\*") + (f" (n = {count})" if count < most else "")


def short_commit(provenance: dict[str, Any]) -> str:
    """Return the commit of a run in twelve digits, with "-dirty" if files were changed."""
    commit, dirty, _ = (provenance["commit"] or "unknown").partition("-dirty")
    return commit[:12] + dirty


def _percent(own: BySeed | None, most: int = 0) -> str:
    """Format accuracies, with their number, or the seeds if they are not the first ones, if it is below `most`."""
    if not own:
        return "–"
    number = f" (n = {len(own)})"
    if sorted(map(int, own)) != list(range(len(own))):
        number = f" (seeds {', '.join(own)})"
    return accuracy.in_percent(list(own.values())) + (number if len(own) < most else "")


def _name(method: str) -> str:
    plain, _, variant = method.partition("-")
    if method in _NAMES or plain not in _NAMES or variant not in _GUIDANCE:
        return _NAMES.get(method, method)
    words = _GUIDANCE[variant]
    return f"{_NAMES[plain]}{words if plain == 'feddifrc' else f' with guidance{words}'}"


def _headings(labels: dict[str, str]) -> list[str]:
    return [paper_numbers.PARTITIONS.get(partition, label) for partition, label in labels.items()]


def _accuracies(experiment: dict[str, Any]) -> str:
    found, labels = experiment["accuracies"], experiment["partitions"]
    methods = list(dict.fromkeys(method for by_method in found.values() for method in by_method))
    best = {p: max(statistics.fmean(own.values()) for own in by_method.values()) for p, by_method in found.items()}
    most = max(len(own) for by_method in found.values() for own in by_method.values())

    def cell(partition: str, method: str) -> str:
        own = found[partition].get(method)
        text = _percent(own, most)
        return f"**{text}**" if own and statistics.fmean(own.values()) == best[partition] else text

    rows = [[_name(method), *(cell(partition, method) for partition in labels)] for method in methods]
    return table(["accuracy, %", *_headings(labels)], rows)


def _gains(experiment: dict[str, Any], pairs: dict[str, str]) -> str:
    """Show the gain of each method over its pair, and over all of them how often it is positive."""
    found, labels = experiment["accuracies"], experiment["partitions"]
    gains = {
        partition: {
            method: gain_of(found[partition].get(method, {}), found[partition].get(other, {}))
            for method, other in pairs.items()
        }
        for partition in labels
    }
    most = max(len(gain.by_seed) for by_method in gains.values() for gain in by_method.values() if gain)
    rows = [
        [f"{_name(method)} over {_name(other)}", *(_points(gains[partition][method], most) for partition in labels)]
        for method, other in pairs.items()
    ]
    if len(pairs) > 1:
        known = {p: [gain for gain in gains[p].values() if gain] for p in labels}
        rows.append(["all: seeds that gain", *(_share_better(known[p]) for p in labels)])
        rows.append(["all: intervals above 0, below 0", *(_signs(known[p]) for p in labels)])
    return table(["gain, points", *_headings(labels)], rows)


def _share_better(gains: list[Gain]) -> str:
    values = [value for gain in gains for value in gain.by_seed]
    return f"{sum(value > 0 for value in values)} of {len(values)}"


def _signs(gains: list[Gain]) -> str:
    return f"{sum(gain.sign > 0 for gain in gains)}, {sum(gain.sign < 0 for gain in gains)} of {len(gains)}"


def _claims(experiment: dict[str, Any], pairs: list[tuple[str, str, str]], more: list[list[str]] | None = None) -> str:
    """Compare gains with the paper's; `pairs` has method, other, and the paper's partition; `more` are rows."""
    found = next(iter(experiment["accuracies"].values()))
    rows = []
    for method, other, partition in pairs:
        claimed = paper_numbers.gain(method, other, partition)
        if claimed is None or method not in found or other not in found:
            continue
        if not (own := gain_of(found[method], found[other])):
            continue
        name = f"{_VARIANTS.get(method, _name(method))} over {_VARIANTS.get(other, _name(other))}"
        name = name.replace("both losses", "both" if "alone" in name else "FedDifRC").replace(
            "both over layer", "fused layers over layer"
        )
        rows.append([name, f"{claimed:+.2f}", _points(own), verdict(own, claimed)])
    return table(["claim", "the paper, points", "ours, points", "our interval"], [*rows, *(more or [])])


def _paper(found: dict[str, Summary]) -> str:
    rows = [
        [label, *(f"{values[p]:.2f}" if p in values else "–" for p in paper_numbers.PARTITIONS)]
        for label, values in [
            *((_name(method), values) for method, values in paper_numbers.METHODS.items()),
            *((_VARIANTS[name], values) for name, values in paper_numbers.ABLATION.items()),
        ]
    ]
    return table(["accuracy, %", *paper_numbers.PARTITIONS.values()], rows)


def _sweep(name: str) -> Callable[[dict[str, Summary]], str]:
    """Return the writer of a plain sweep: for every experiment of it, accuracies, then gains."""

    def write(found: dict[str, Summary]) -> str:
        if name not in found:
            return "Not run yet."
        summary = found[name]
        text = ""
        for experiment in summary["experiments"]:
            if len(summary["experiments"]) > 1:
                changes = ", ".join(f"`{key}: {value}`" for key, value in experiment["changes"].items())
                text += f"With {changes}:\n\n"
            pairs = experiment["unguided"]
            methods, baseline = next(iter(experiment["accuracies"].values())), experiment["baseline"]
            if not pairs and baseline:
                pairs = {method: baseline for method in methods if method != baseline}
            text += _accuracies(experiment) + (_gains(experiment, pairs) if pairs else "")
        return text + caption(summary)

    return write


def _digits_table(found: dict[str, Summary]) -> str:
    text = _sweep("digits-table")(found)
    if "digits-table" not in found:
        return text
    pairs = [("feddifrc", other, "nid1_005") for other in ("fedavg", "fedprox", "moon", "fednh")]
    intro = "The paper's gains on CIFAR-10 and ours on digits, both at NID1 0.05:\n\n"
    return text + "\n" + intro + _claims(found["digits-table"]["experiments"][0], pairs)


def _ablation(found: dict[str, Summary]) -> str:
    if "digits-ablation" not in found:
        return "Not run yet."
    summary = found["digits-ablation"]
    (experiment,) = summary["experiments"]
    ((partition, own),) = experiment["accuracies"].items()
    baseline, default = own["fedavg"], own["feddifrc"]

    most = max(map(len, own.values()))

    def row(name: str, values: BySeed) -> list[str]:
        pair = [_points(gain_of(values, other), most) for other in (baseline, default)]
        return [name, _percent(values, most), pair[0], "" if values is default else pair[1]]

    rows = [["FedAvg", _percent(baseline, most), "", _points(gain_of(baseline, default))]]
    rows += [row(_VARIANTS[method], values) for method, values in own.items() if method != "fedavg"]
    more, origins, best = [], [], []
    for name, words in (
        ("digits-timesteps", "timestep {} (default 300)"),
        ("digits-negatives", "negatives: {} (default: all 9)"),
    ):
        for value, other in _by_value(found, name):
            if value == 300:
                continue
            values = other["accuracies"][partition]["feddifrc"]
            more.append(row(words.format(value), values))
            if name == "digits-timesteps" and (gain := gain_of(default, values)):
                best.append([f"timestep 300 over {value}", "above 0", _points(gain), verdict(gain, 1)])
        origins += [name] if name in found else []
    header = ["variant", "accuracy, %", "gain over FedAvg", "gain over both losses"]
    pairs = [("tdcl", "fedavg"), ("ndcr", "fedavg"), ("feddifrc", "fedavg"), ("feddifrc", "tdcl"), ("feddifrc", "ndcr")]
    claims = [(*pair, "nid1_005") for pair in pairs] + [("feddifrc", name, "nid1_02") for name in ("layer2", "layer3")]
    text = table(header, rows + more) + caption(summary)
    for name in origins:
        text += f"\n`{name}`: {caption(found[name])}"
    return (
        text
        + "\nThe paper's claims on CIFAR-10 (layers: at NID1 0.2) and ours:\n\n"
        + _claims(experiment, claims, best)
    )


def _by_value(found: dict[str, Summary], name: str) -> list[tuple[Any, Summary]]:
    """Return the experiments of a preset that changes one key, with its values, in the order of these."""
    pairs = []
    for one in found.get(name, {}).get("experiments", []):
        (value,) = one["changes"].values()
        pairs.append((value, one))
    return sorted(pairs, key=lambda pair: (isinstance(pair[0], str), pair[0]))


def _heterogeneity(found: dict[str, Summary]) -> str:
    rows, origins = [], []
    for name in ("digits-heterogeneity", "digits-domains"):
        summary = found.get(name, {"experiments": []})
        origins += [f"`{name}`: {caption(summary)}"] if summary["experiments"] else []
        most = max(map(len, _cells(summary)), default=0)
        for experiment in summary["experiments"]:
            changes = experiment["changes"]
            words = next((words for key, words in _EXPERIMENTS.items() if key in changes), "two domains")
            own = next(iter(experiment["accuracies"].values()))
            label = words.format(*(value for key, value in changes.items() if _EXPERIMENTS.get(key) == words))
            row = [label, _percent(own.get("fedavg"), most)]
            for method in _WEIGHTS:
                gain = gain_of(own.get(method, {}), own.get("fedavg", {}))
                row += [_percent(own.get(method), most), _points(gain, most)]
            rows.append(row)
    if not rows:
        return "Not run yet."
    header = ["setting", "FedAvg, %"]
    for words in _WEIGHTS.values():
        header += [f"FedDifRC, {words}, %", "gain, points"]
    return table(header, rows) + "\n".join(origins)


def _cifar(found: dict[str, Summary]) -> str:
    text = _sweep("cifar10-mini")(found)
    features = found["cifar10-mini"]["experiments"][0]["features"] if "cifar10-mini" in found else None
    if not features:
        return text
    return text + (
        f"\nThe guide: a linear probe on the features reaches {100 * features['probe']:.1f} %, the margin of the "
        f"matching prompt is {features['margin']:.4f}, and the separation of prompts {features['separation']:.4f}.\n"
    )


def _combinations(found: dict[str, Summary]) -> str:
    """Compare weights of the guidance under other methods, each with the method alone and with the default weights."""
    if "digits-combinations" not in found:
        return "Not run yet."
    own = found["digits-combinations"]["experiments"][0]["accuracies"]["nid1_005"]
    rows, most = [], max(map(len, own.values()))
    for method, values in own.items():
        plain, _, variant = method.partition("-")
        over_plain, over_default = (
            _points(gain_of(values, own[other]), most) for other in (plain, f"{plain}-feddifrc")
        )
        shown = [over_plain if variant else "", over_default if variant not in ("", "feddifrc") else ""]
        rows.append([_name(method), _percent(values, most), *shown])
    header = ["method", "accuracy on the validation split, %", "gain over the method alone", "gain over weights 1"]
    return table(header, rows) + caption(found["digits-combinations"])


def _default(found: dict[str, Summary]) -> str:
    if "default" not in found:
        return "Not run yet."
    (experiment,) = found["default"]["experiments"]
    return _accuracies(experiment) + _gains(experiment, {"feddifrc": "fedavg"}) + caption(found["default"])


def _guides(found: dict[str, Summary]) -> str:
    points = _quality(found)
    if not points:
        return "Not run yet."
    rows = [
        [
            label,
            f"{100 * own['probe']:.1f}",
            f"{own['margin'] + 0.0:.2g}",
            f"{own['separation']:.2g}",
            *(_points(gains.get(method)) for method in [*_WEIGHTS, _OVER_DEFAULT]),
        ]
        for label, own, gains in points
    ]
    header = ["features", "probe, %", "margin of the matching prompt", "separation of prompts"]
    header += [f"gain over FedAvg, {words}, points" for words in _WEIGHTS.values()]
    text = table([*header, "NDCR's weight 10: gain over tiny-sd, t = 300, points"], rows)
    text += "![Gain against probe, margin and separation](gallery/guide-quality.svg)\n\n"
    text += "Spearman's rank correlation of the gain with each:"
    for method, words in _WEIGHTS.items():
        known = [(own, gains[method].mean) for _, own, gains in points if method in gains]
        means = [mean for _, mean in known]
        ranks = {name: spearmanr([own[name] for own, _ in known], means).statistic for name in _QUALITIES}
        text += f" with {words}, " + ", ".join(f"{name} {rank:.2f}" for name, rank in ranks.items()) + ";"
    origins = [name for name in ("digits-ablation", "digits-timesteps", "digits-guides") if name in found]
    return text[:-1] + ".\n\n" + "\n".join(f"`{name}`: {caption(found[name])}" for name in origins)


def _quality(found: dict[str, Summary]) -> list[tuple[str, dict[str, float], dict[str, Gain]]]:
    """Return label, probe and margin, and gains for every feature set at NID1 0.05.

    Gains are over FedAvg by method, and `_OVER_DEFAULT`.
    """
    if "digits-ablation" not in found:
        return []
    baseline = found["digits-ablation"]["experiments"][0]["accuracies"]["nid1_005"]["fedavg"]
    experiments = [one for _, one in _by_value(found, "digits-timesteps")]
    experiments += found.get("digits-guides", {}).get("experiments", [])
    measured = [(one, one["accuracies"]["nid1_005"]) for one in experiments if one["features"]]
    known = [own[method] for _, own in measured for method in _WEIGHTS if method in own]
    common = set(baseline).intersection(*known)  # other seeds cannot be compared
    points, tenfold = [], "feddifrc-ndcr-tenfold"
    default = next((own for one, own in measured if one["changes"].get("extract_features.timestep") == 300), {})
    for one, runs in measured:
        gains = {}
        for method in _WEIGHTS:
            own = {seed: value for seed, value in runs.get(method, {}).items() if seed in common}
            if gain := gain_of(own, baseline):
                gains[method] = gain
        if runs is not default and (gain := gain_of(runs.get(tenfold, {}), default.get(tenfold, {}))):
            gains[_OVER_DEFAULT] = gain
        changes = one["changes"]
        timestep = changes.get("extract_features.timestep")
        trained = changes.get("prepare_backbone.training", {}).get("denoiser_steps")
        label = f"tiny-sd, t = {timestep}" if timestep else f"guide of {trained} steps, t = 300"
        if gains:
            points.append((label, one["features"], gains))
    return points


@plotting.svg
def quality_picture(found: dict[str, Summary]) -> Figure:
    """Draw the gain of FedDifRC against what analyze-features measures of its features, one row per weight."""
    points = _quality(found)
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    grid = figure.subplots(len(_WEIGHTS), len(_QUALITIES), sharex="col", sharey="row")
    for row, (method, words) in zip(grid, _WEIGHTS.items(), strict=True):
        for axes, key in zip(row, _QUALITIES, strict=True):
            unit = 100 if key == "probe" else 1
            places = {}
            for label, features, gains in points:
                if method not in gains:
                    continue
                gain, is_guide = gains[method], "guide" in label
                place, colour = (unit * features[key], 100 * gain.mean), "#D55E00" if is_guide else "#0072B2"
                half_width = None if gain.half_width is None else 100 * gain.half_width
                axes.errorbar(*place, yerr=half_width, fmt="o", color=colour, ecolor=f"{colour}55", capsize=2)
                places[label.replace("tiny-sd, ", "").replace("guide of ", "").replace(", t = 300", "")] = place
            axes.axhline(0, color=plotting.INK, lw=0.8)
            axes.grid()
            for name, place in _apart(places).items():
                axes.annotate(name, place, xytext=(5, 4), textcoords="offset points", fontsize=8)
        row[0].set(ylabel=f"gain over FedAvg, points\n({words})")
    for axes, words in zip(grid[-1], _QUALITIES.values(), strict=True):
        axes.set(xlabel=words)
    figure.suptitle("Blue: tiny-sd at seven timesteps; orange: six guides by training steps, t = 300", fontsize=10)
    return figure


def _apart(places: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Return the places, by label, whose labels would not cover that of another place; the table has all of them."""

    def is_near(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return abs(one[0] - other[0]) < 0.2 * width and abs(one[1] - other[1]) < 1

    width = max(x for x, _ in places.values()) - min(x for x, _ in places.values()) if places else 0
    return {
        label: place
        for label, place in places.items()
        if not any(is_near(place, other) for name, other in places.items() if name != label)
    }


def _conditioning(found: dict[str, Summary]) -> str:
    if "local-conditioning" not in found:
        return "Not run yet."
    summary = found["local-conditioning"]
    runs = summary["accuracies"]
    names = {
        "fedavg": "FedAvg", "none": "FedDifRC, prompts alone", "frozen": "FedDifRC, on the initial network's feature",
        "local": "FedDifRC, on the received model's feature (the paper)",
    }  # fmt: skip
    rows = [
        [label, accuracy.in_percent(runs[name]), *(_against(runs, name, other) for other in ("fedavg", "none"))]
        for name, label in names.items()
    ]
    header = ["variant", "accuracy, %", "gain over FedAvg", "gain over prompts alone"]
    return table(header, rows) + f"NID1 with alpha 0.05; {_origin(summary)}\n"


def _origin(numbers: Summary) -> str:
    """Describe the numbers of a benchmark that trains by itself, and where they come from."""
    made, seeds = numbers["provenance"], numbers["seeds"]
    gains = accuracy.gain_in_words(seeds).replace("*", "\\*")
    hardware = f"{made['hardware']['cores']} cores of {made['hardware']['cpu']}"
    return (
        f"{accuracy.in_words(numbers['num_rounds'], seeds)}. Gains, in points, are {gains}. On {hardware}; torch "
        f"{made['packages']['torch']}; commit {short_commit(made)}."
    )


def _linear_head(found: dict[str, Summary]) -> str:
    parts = []
    for data, (sweep, names) in _COMPARED_NETWORKS.items():
        if not {f"linear-head-{data}", sweep} <= found.keys():
            continue
        head, experiment = found[f"linear-head-{data}"], found[sweep]["experiments"][0]
        seeds, trained = head["seeds"], experiment["accuracies"][head["partition"]]
        by_rate = {rate: dict(zip(map(str, seeds), own, strict=True)) for rate, own in head["accuracies"].items()}
        best = max(by_rate.values(), key=lambda own: statistics.fmean(own.values()))
        others = [(_name(name), trained[name]) for name in names]
        others += [(f"classifier of the features, rate {rate}", own) for rate, own in by_rate.items()]
        rows = [[name, _percent(own), "" if own is best else _points(gain_of(own, best))] for name, own in others]
        rows.append(["classifier of the features, central", f"{100 * head['central']:.2f}", ""])
        header = [data, "accuracy, %", "gain over the classifier at its best rate"]
        assert head["partition"] == "nid1_005" and experiment["changes"].get("train_fl.learning_rate", 0.01) == 0.01
        note = f"NID1 with alpha 0.05; {_origin(head)} The networks are those of `{sweep}`, at a rate of 0.01.\n"
        parts.append(table(header, rows) + note)
    return "\n".join(parts) or "Not run yet."


def _against(runs: dict[str, list[float]], name: str, other: str) -> str:
    return "" if name == other else _points(accuracy.gain(runs[name], runs[other]))


SECTIONS: dict[str, Callable[[dict[str, Summary]], str]] = {
    "default": _default,
    "paper": _paper,
    "digits-table": _digits_table,
    "digits-ablation": _ablation,
    "digits-combinations": _combinations,
    "digits-heterogeneity": _heterogeneity,
    "digits-many-clients": _sweep("digits-many-clients"),
    "digits-self-supervised": _sweep("digits-self-supervised"),
    "digits-synthetic": _sweep("digits-synthetic"),
    "digits-guides": _guides,
    "local-conditioning": _conditioning,
    "linear-head": _linear_head,
    "cifar10-mini": _cifar,
    "cifar10-mini-resnet10": _sweep("cifar10-mini-resnet10"),
    "cifar10-weights": _sweep("cifar10-weights"),
    "cifar10-guided": _sweep("cifar10-guided"),
    "guidance-weights": _sweep("guidance-weights"),
    "digits-tuned": _sweep("digits-tuned"),
    "digits-long": _sweep("digits-long"),
}
