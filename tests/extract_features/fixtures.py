"""Small projects with a given backbone."""

from pathlib import Path

from ruamel.yaml import YAML

from tests.conftest import REPOSITORY, invoke, write_params


def section(model, name, **changes):
    """A section of the repository's params.yaml, with changes."""
    values = YAML(typ="safe").load((REPOSITORY / "params.yaml").read_text(encoding="utf-8"))
    return model.model_validate(values[name] | changes)


def project(root: Path, images: int = 40, source: Path | None = None, **changes) -> Path:
    """A project on a few digits with the backbone at `source`, or tiny-sd; changes are extract_features' keys."""
    root.mkdir(parents=True, exist_ok=True)
    keys = {f"extract_features.{name}": value for name, value in changes.items()}
    settings = {"prepare_data.train_subset": images, "extract_features.basis_images": 20, **keys}
    if source:
        settings |= {"prepare_backbone.name": source.name, "prepare_backbone.source": str(source)}
    write_params(root, settings)
    for command in ("prepare-data", "prepare-backbone"):
        result = invoke(root, command)
        assert result.exit_code == 0, result.output
    return root


def extract(root: Path, *arguments: str):
    """Run extract-features in this process and return the set's folder."""
    result = invoke(root, "extract-features", *arguments)
    assert result.exit_code == 0, result.output
    return Path(result.output.splitlines()[-1])
