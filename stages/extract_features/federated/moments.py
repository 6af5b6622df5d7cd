"""The moments of the nodes' maps and representations: how they are added, and sent as Flower's records."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

from pipeline.diffusion.representation import Moments
from pipeline.errors import DataError
from pipeline.feature_store import LayerBasis

_OF_BASIS = ("mean", "components", "explained_variance")


def pack_moments(moments: Mapping[str, Moments]) -> RecordDict:
    """Return the moments by layer as the content of a message."""
    arrays = {f"{layer}:{part}": getattr(own, part) for layer, own in moments.items() for part in ("mean", "scatter")}
    counts = {layer: own.count for layer, own in moments.items()}
    return RecordDict({"moments": _record(arrays), "counts": MetricRecord(counts)})  # type: ignore[arg-type]


def read_moments(content: RecordDict, channels: Mapping[str, int]) -> dict[str, Moments]:
    """Return the moments of one node's vectors by layer; raise DataError if its answer is invalid or not finite."""
    found = {layer: Moments(width) for layer, width in channels.items()}
    try:
        for layer, width in channels.items():
            mean = _array(content.array_records["moments"], f"{layer}:mean", (width,))
            scatter = _array(content.array_records["moments"], f"{layer}:scatter", (width, width))
            found[layer].add(_count(content, layer), torch.from_numpy(mean), torch.from_numpy(scatter))
    except Exception as error:  # untrusted bytes, parsed by several libraries: any exception means invalid
        raise DataError(f"invalid moments ({error!r})") from None
    return found


def add_moments(parts: Iterable[Mapping[str, Moments]]) -> dict[str, Moments]:
    """Return the moments of all nodes' vectors; at least one node, in the order of clients."""
    total: dict[str, Moments] = {}
    for part in parts:
        for layer, own in part.items():
            total.setdefault(layer, Moments(len(own.mean))).add(own.count, own.mean, own.scatter)
    return total


def pack_layers(layers: Mapping[str, LayerBasis]) -> RecordDict:
    """Return the PCA by layer as the content of a message."""
    arrays = {f"{layer}:{part}": getattr(basis, part) for layer, basis in layers.items() for part in _OF_BASIS}
    totals = {layer: basis.total_variance for layer, basis in layers.items()}
    return RecordDict({"layers": _record(arrays), "totals": MetricRecord(totals)})  # type: ignore[arg-type]


def unpack_layers(content: RecordDict) -> dict[str, LayerBasis]:
    """Read the PCA by layer from the server's message."""
    arrays, layers = content.array_records["layers"], {}
    for layer, total in content.metric_records["totals"].items():
        mean, components, explained = (np.array(arrays[f"{layer}:{part}"].numpy()) for part in _OF_BASIS)
        layers[layer] = LayerBasis(mean, components, explained, float(total))  # type: ignore[arg-type]
    return layers


def pack_pooled(values: np.ndarray) -> RecordDict:
    """Return number, mean and squared deviations of representations float64 (n, D) as the content of a message."""
    mean = values.mean(0)
    arrays = {"mean": mean, "squares": np.square(values - mean).sum(0)}
    return RecordDict({"pooled": _record(arrays), "counts": MetricRecord({"images": len(values)})})


def read_pooled(content: RecordDict, dims: int) -> tuple[int, np.ndarray, np.ndarray]:
    """Return number, mean and squared deviations (dims,) of one node's representations, or raise DataError."""
    try:
        mean, squares = (_array(content.array_records["pooled"], key, (dims,)) for key in ("mean", "squares"))
        return _count(content, "images"), mean, squares
    except Exception as error:  # as above
        raise DataError(f"invalid statistics ({error!r})") from None


def add_pooled(parts: Iterable[tuple[int, np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation (D,) of all nodes' representations; at least one node."""
    (count, mean, squares), *others = parts
    for own, own_mean, own_squares in others:
        shift, total = own_mean - mean, count + own
        squares = squares + own_squares + np.square(shift) * (count * own / total)
        mean = mean + shift * (own / total)
        count = total
    return mean, np.sqrt(squares / count)


def _count(content: RecordDict, name: str) -> int:
    count = int(content.metric_records["counts"][name])  # type: ignore[arg-type]
    if not 0 < count < 2**40:
        raise ValueError(f"{name}: {count}")
    return count


def _record(arrays: Mapping[str, np.ndarray | torch.Tensor]) -> ArrayRecord:
    return ArrayRecord(
        {name: Array(torch.as_tensor(value).cpu().contiguous().numpy()) for name, value in arrays.items()}
    )


def _array(record: ArrayRecord, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return a finite float64 array of this shape."""
    array = np.array(record[name].numpy())
    if array.dtype != np.float64 or array.shape != shape or not np.isfinite(array).all():
        raise ValueError(f"{name} is {array.dtype} of shape {array.shape}, or not finite; float64 {shape} is expected")
    return array
