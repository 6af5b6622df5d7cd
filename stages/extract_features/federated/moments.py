"""What nodes send of their maps and representations, how it adds up, and how it travels as Flower's records."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

from pipeline.diffusion.representation import Moments
from pipeline.errors import PipelineError
from pipeline.feature_store import LayerBasis

_MALFORMED = (KeyError, TypeError, ValueError, OverflowError)


def pack_moments(moments: Mapping[str, Moments]) -> RecordDict:
    """Layer -> moments, as a message's content."""
    arrays = {f"{layer}:{part}": getattr(own, part) for layer, own in moments.items() for part in ("mean", "scatter")}
    counts = {layer: own.count for layer, own in moments.items()}
    return RecordDict({"moments": _record(arrays), "counts": MetricRecord(counts)})  # type: ignore[arg-type]


def add_moments(contents: Iterable[RecordDict], channels: Mapping[str, int]) -> dict[str, Moments]:
    """The moments of all nodes' vectors together.

    Args:
        contents: of the nodes' answers, in the order of clients.
        channels: layer -> C.

    Raises:
        PipelineError: an answer holds no such moments, or they are not finite.
    """
    total = {layer: Moments(width) for layer, width in channels.items()}
    for content in contents:
        try:
            for layer, width in channels.items():
                mean = _array(content.array_records["moments"], f"{layer}:mean", (width,))
                scatter = _array(content.array_records["moments"], f"{layer}:scatter", (width, width))
                count = int(content.metric_records["counts"][layer])  # type: ignore[arg-type]
                if count <= 0:
                    raise ValueError(f"{layer}: {count} vectors")
                total[layer].add(count, torch.from_numpy(mean), torch.from_numpy(scatter))
        except _MALFORMED as error:
            raise PipelineError(f"a node's moments cannot be used: {error!r}") from None
    return total


def pack_layers(layers: Mapping[str, LayerBasis]) -> RecordDict:
    """Layer -> its PCA, as a message's content."""
    parts = ("mean", "components", "explained_variance")
    arrays = {f"{layer}:{part}": getattr(basis, part) for layer, basis in layers.items() for part in parts}
    totals = {layer: basis.total_variance for layer, basis in layers.items()}
    return RecordDict({"layers": _record(arrays), "totals": MetricRecord(totals)})  # type: ignore[arg-type]


def unpack_layers(content: RecordDict) -> dict[str, LayerBasis]:
    """The PCA of every layer, as the server sent it."""
    arrays, totals = content.array_records["layers"], content.metric_records["totals"]

    def array(layer: str, part: str) -> np.ndarray:
        return np.array(arrays[f"{layer}:{part}"].numpy())

    return {
        layer: LayerBasis(
            mean=array(layer, "mean"),
            components=array(layer, "components"),
            explained_variance=array(layer, "explained_variance"),
            total_variance=float(total),  # type: ignore[arg-type]
        )
        for layer, total in totals.items()
    }


def pack_pooled(values: np.ndarray) -> RecordDict:
    """Representations float64 (n, D) -> their number, mean and squares about it, as a message's content."""
    mean = values.mean(0)
    arrays = {"mean": mean, "squares": np.square(values - mean).sum(0)}
    return RecordDict({"pooled": _record(arrays), "counts": MetricRecord({"images": len(values)})})


def add_pooled(contents: Iterable[RecordDict], dims: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (D,) of all nodes' representations together.

    Raises:
        PipelineError: an answer holds no such numbers.
    """
    count, mean, squares = 0, np.zeros(dims), np.zeros(dims)
    for content in contents:
        try:
            own = int(content.metric_records["counts"]["images"])  # type: ignore[arg-type]
            own_mean, own_squares = (
                _array(content.array_records["pooled"], key, (dims,)) for key in ("mean", "squares")
            )
        except _MALFORMED as error:
            raise PipelineError(f"a node's statistics cannot be used: {error!r}") from None
        shift, total = own_mean - mean, count + own
        squares += own_squares + np.square(shift) * (count * own / total)
        mean += shift * (own / total)
        count = total
    return mean, np.sqrt(squares / count)


def _record(arrays: Mapping[str, np.ndarray | torch.Tensor]) -> ArrayRecord:
    return ArrayRecord(
        {name: Array(torch.as_tensor(value).cpu().contiguous().numpy()) for name, value in arrays.items()}
    )


def _array(record: ArrayRecord, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """float64, finite and of this shape."""
    array = np.array(record[name].numpy())
    if array.dtype != np.float64 or array.shape != shape or not np.isfinite(array).all():
        raise ValueError(f"{name} is {array.dtype} of shape {array.shape}, or not finite; float64 {shape} is expected")
    return array
