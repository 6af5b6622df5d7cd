"""Write the output of a sweep atomically: table, curves, maps and preset."""

from pathlib import Path
from typing import Any

from pipeline.io import atomic
from stages.analyze_features.probes import chance
from stages.analyze_features.sweep import figures as sweep_figures
from stages.analyze_features.sweep.cache import SweepResult
from stages.analyze_features.sweep.plan import SweepPlan
from stages.analyze_features.sweep.recommend import Choice, as_preset

PRESET = "recommended.yaml"


def write(target: Path, plan: SweepPlan, swept: dict[int, SweepResult], choice: Choice) -> None:
    """Replace the folder `target` by the results by timestep, ascending, and the choice, unless writing fails."""
    with atomic.replace_folder(target) as folder:
        _write_table(folder, plan, swept, choice)
        atomic.write_text(folder / PRESET, _preset(plan.made_of, choice))
        _write_maps(folder, plan, swept)


def _write_table(folder: Path, plan: SweepPlan, swept: dict[int, SweepResult], choice: Choice) -> None:
    """Write the table as CSV and JSON, and its curves."""
    rows = [candidate.row() for found in swept.values() for candidate in found.candidates]
    by_chance = chance(plan.data.labels[plan.index], plan.prompts_per_image, plan.made_of["judged_by"]["seed"])
    joined = [row | {"layers": "+".join(row["layers"]), "dims": "+".join(map(str, row["dims"]))} for row in rows]
    atomic.write_csv(folder / "sweep.csv", joined)
    content = {"rows": rows, **choice.rows(), "chance": by_chance, "made_of": plan.made_of}
    atomic.write_json(folder / "sweep.json", content)
    own_layers = next(iter(swept.values())).own_layers
    curves = sweep_figures.curves(rows, choice.recommended.row(), own_layers, by_chance)
    atomic.write_text(folder / "sweep.svg", curves)


def _preset(made_of: dict[str, Any], choice: Choice) -> str:
    images, share = made_of["images"], made_of["sweep_features"]["explained_variance"]
    rests_on = f"Of {images['sampled']:,} training images the probe was scored on {images['held_out']:,}"
    rests_on += f", the prompts on {images['prompted']:,}." if choice.by_prompts else "."
    described = f"{made_of['dataset']['name']} with {made_of['backbone']['name']}"
    return as_preset(choice, described, rests_on, share, made_of["extract_features"])


def _write_maps(folder: Path, plan: SweepPlan, swept: dict[int, SweepResult]) -> None:
    """Write a picture of each of the first images: all layers by all timesteps."""
    pictured = plan.index[: plan.made_of["sweep_features"]["picture_images"]]
    if not len(pictured):
        return
    layers = next(iter(swept.values())).colours
    matched = {
        layer: sweep_figures.with_signs_matched([found.colours[layer] for found in swept.values()]) for layer in layers
    }
    for place, (image, pixels) in enumerate(zip(pictured, plan.data.take(pictured).images, strict=True)):
        of_image = {
            timestep: {layer: by_timestep[at][place] for layer, by_timestep in matched.items()}
            for at, timestep in enumerate(swept)
        }
        atomic.write_bytes(folder / f"maps-{image}.png", sweep_figures.maps(pixels, of_image))
