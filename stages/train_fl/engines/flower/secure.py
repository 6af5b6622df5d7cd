"""SecAgg+ (Bell et al., CCS 2020) by Flower's own protocol: the server sees the sum of the nodes' weights, no node's.

Flower has it for the messages of its first API, with weights as a list and everything else in one flat mapping. Here
a round's orders and answers are put into that form and out of it again, and the protocol runs between. It quantises:
with weights w_k = n_k / max_samples, a mean is exact to about clipping_range / 2^22 / (mean w_k).
A node that drops out during the protocol is left out, as long as enough others hold shares of its key.
"""

import logging
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.clientapp.typing import ClientAppCallable
from flwr.common import Code, FitIns, FitRes, Parameters, Status
from flwr.compat.common import recorddict_compat as compat
from flwr.server import LegacyContext
from flwr.server.workflow import SecAggPlusWorkflow
from flwr.server.workflow.constant import MAIN_CONFIGS_RECORD, MAIN_PARAMS_RECORD, Key
from flwr.serverapp import Grid

from pipeline.errors import PipelineError
from pipeline.federation.members import reason_of
from pipeline.settings.params import SecureAggregation
from stages.train_fl.engines.flower.messages import Work, to_tensors
from stages.train_fl.engines.flower.strategy import Exchange, MethodStrategy

log = logging.getLogger(__name__)

_NAMES = "names"
_SHARES = 1.0  # of its neighbours, all, hold a share of a node's key
_NEEDED = 0.6  # of the shares, to open what a lost node left masked


def protect(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """The node's side: three steps of the protocol, and training in one of them.

    Raises:
        PipelineError: training refuses.
    """

    def train(inner: Message, context: Context) -> Message:
        given = compat.recorddict_to_fitins(inner.content, keep_input=True)
        order = dict(given.config)
        names = str(order.pop(_NAMES)).split()
        arrays = compat.parameters_to_arrayrecord(given.parameters, keep_input=True)
        weights = ArrayRecord(dict(zip(names, arrays.values(), strict=True)))
        inner.content = RecordDict({"weights": weights, "order": ConfigRecord(order)})  # type: ignore[arg-type]
        reply = call_next(inner, context)
        if reply.has_error():
            raise PipelineError(reply.error.reason or "it failed without a word")
        trained = reply.content.array_records["weights"]
        parameters = compat.arrayrecord_to_parameters(
            ArrayRecord({name: trained[name] for name in names}), keep_input=True
        )
        numbers = dict(reply.content.metric_records["work"])
        result = FitRes(Status(Code.OK, ""), parameters, int(numbers["num-samples"]), numbers)  # type: ignore[arg-type]
        reply.content = compat.fitres_to_recorddict(result, keep_input=True)
        return reply

    return secaggplus_mod(message, context, train)


def secure_exchange(core: MethodStrategy, grid: Grid, timeout: float, params: SecureAggregation) -> Exchange:
    """A round's weights and updates through SecAgg+: the counterpart of `plain_exchange`."""
    workflow = SecAggPlusWorkflow(
        _SHARES,
        _NEEDED,
        max_weight=float(params.max_samples),
        clipping_range=params.clipping_range,
        timeout=timeout,
    )

    def exchange(number: int, arrays: ArrayRecord) -> ArrayRecord | None:
        messages = list(core.configure_train(number, arrays, ConfigRecord(), grid))
        listening = _Listening(grid)
        legacy = _Round(messages)
        context = Context(0, 0, {}, RecordDict(), {})
        legacy_context = LegacyContext(context, strategy=legacy, client_manager=legacy)  # type: ignore[arg-type]
        legacy_context.state.config_records[MAIN_CONFIGS_RECORD] = ConfigRecord({Key.CURRENT_ROUND: number})
        legacy_context.state.array_records[MAIN_PARAMS_RECORD] = arrays
        workflow(listening, legacy_context)  # type: ignore[arg-type]
        works, problems = _works(core, legacy, arrays)
        return core.add_sum(number, works, listening.problems | problems)

    return exchange


class _Round:
    """What the protocol asks of a strategy of Flower's first API: a round's orders, and where its sum goes."""

    def __init__(self, messages: list[Message]) -> None:
        self._messages = messages
        self.results: dict[int, FitRes] = {}

    def configure_fit(self, server_round: int, parameters: Parameters, client_manager: Any) -> list[tuple[Any, FitIns]]:
        orders = []
        for message in self._messages:
            weights = message.content.array_records["weights"]
            config: dict[str, Any] = {**message.content.config_records["order"], _NAMES: " ".join(weights)}
            parameters = compat.arrayrecord_to_parameters(weights, keep_input=True)
            orders.append((SimpleNamespace(node_id=message.metadata.dst_node_id), FitIns(parameters, config)))
        return orders

    def aggregate_fit(self, server_round: int, results: list[tuple[Any, FitRes]], failures: list[Any]) -> Any:
        self.results = {proxy.node_id: result for proxy, result in results}
        return None, {}

    def num_available(self) -> int:
        return len(self._messages)


class _Listening:
    """A grid that remembers why nodes failed."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self.problems: dict[int, str] = {}

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies = list(self._grid.send_and_receive(messages, timeout=timeout))
        for reply in replies:
            if reply.has_error():
                self.problems[reply.metadata.src_node_id] = reason_of(reply)
        return replies


def _works(core: MethodStrategy, legacy: _Round, arrays: ArrayRecord) -> tuple[dict[int, Work], dict[int, str]]:
    """Per node what it says of its work, the weights everybody's mean in each; and who says what cannot be."""
    works, problems = {}, {}
    for node_id, result in legacy.results.items():
        sums = compat.parameters_to_arrayrecord(result.parameters, keep_input=True)
        named = {
            name: Array(array.numpy().astype("float32")) for name, array in zip(arrays, sums.values(), strict=True)
        }
        try:
            mean = to_tensors(ArrayRecord(named), core.progress.server.weights)
            works[node_id] = Work.of(mean, {}, result.metrics)
        except (PipelineError, KeyError, TypeError, ValueError) as error:
            problems[node_id] = str(error)
    return works, problems
