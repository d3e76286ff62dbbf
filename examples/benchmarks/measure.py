"""How a call is measured: times in turn with its rivals, what it costs in operations, FLOPs and memory, a profile."""

import concurrent.futures
import gc
import itertools
import json
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections import Counter
from importlib import metadata
from pathlib import Path

import torch
from common.cli import UserError, make_output_folder
from common.records import results
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

# A timed stretch has at least so many seconds: short calls are repeated within it.
STRETCH = 0.02
# The load, in processes that run, that a machine at rest does not have; and how many seconds to wait for it to sink.
QUIET, PATIENCE = 0.3, 240


def in_turn(calls, rounds, device, title):
    """{name: seconds of each round} of {name: call}: in every round each is timed once, in an order drawn anew."""
    repeats = {}
    for name, call in calls.items():
        call()  # allocates, and compiles kernels
        repeats[name] = max(1, round(STRETCH / max(seconds(call, 1, device), 1e-7)))
    draw, times = random.Random(0), {name: [] for name in calls}
    for _ in tqdm(range(rounds), title, unit="round", leave=False):
        for name in draw.sample(list(calls), len(calls)):
            times[name].append(seconds(calls[name], repeats[name], device) / repeats[name])
    return times


def prepared(calls, rounds, device, title):
    """The same of {name: (prepare, call)}: what `call` takes with what `prepare` gives it, each time anew."""
    draw, times = random.Random(0), {name: [] for name in calls}
    for number in tqdm(range(rounds + 1), title, unit="round", leave=False):
        for name in draw.sample(list(calls), len(calls)):
            prepare, call = calls[name]
            argument = prepare()
            taken = seconds(lambda call=call, argument=argument: call(argument), 1, device)
            if number:  # the first loads what is loaded once
                times[name].append(taken)
    return times


def require_quiet(knobs):
    """Wait for the machine to do nothing else; raise a UserError if it does not come to rest."""
    if knobs.allow_busy or not hasattr(os, "getloadavg"):
        return
    for waited in itertools.count():
        load = os.getloadavg()[0]
        if load <= QUIET:
            return
        if waited == PATIENCE:
            raise UserError(
                f"the load of this machine is {load:.2f}, above {QUIET}: another program runs, and the times would be "
                "its as well; stop it, or pass --allow_busy for times that nobody should quote"
            )
        if not waited:
            print(f"the load is {load:.2f}; waiting for {QUIET}", file=sys.stderr, flush=True)
        time.sleep(1)


def versions(*packages):
    """{package: version}; a UserError for one that is not installed."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            raise UserError(f"this benchmark needs {name}, which is not installed: pip install {name}") from None
    return found


def begin(task, knobs, device):
    """The record of a benchmark so far, which code it is of included; on a machine at rest, with the threads asked for.

    The folder of the results is tried, too: before the work rather than after it.
    """
    make_output_folder(knobs.output_dir)
    require_quiet(knobs)
    torch.set_num_threads(knobs.threads)
    return {
        "task": task,
        "configuration": results.configuration(knobs),
        "environment": results.environment(device),
    }


def write(record, knobs, name):
    """Write the record of a benchmark, to --output_dir and, if it is to be kept, to results; return the folder."""
    output_dir = Path(knobs.output_dir)
    results.write_json(output_dir / f"{name}.json", record)
    if knobs.record:
        results.write_json(results.RESULTS / f"{knobs.record}.json", record)
    print(f"written to {output_dir}: {name}.json")
    return output_dir


def seconds(call, repeats, device):
    """The seconds of so many calls."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device):
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def spread(values):
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": median, "low": low, "high": high}


def ratio(times, one, other):
    """The spread of one's time through the other's, round by round: what else the machine did meets both."""
    return spread([a / b for a, b in zip(times[one], times[other], strict=True)])


class _Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.count += 1
        return function(*arguments, **(keywords or {}))


def operations(call):
    """How many aten operations a call runs."""
    with _Counter() as counter:
        call()
    return counter.count


def flops(call):
    def product(result, one, other, out_shape=None, **options):  # in place, which torch does not count
        return 2 * one[0] * one[1] * other[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product}) as counter:
        call()
    return counter.get_total_flops()


def narrow_products(call, width, repeats):
    """What the matrix products with a side of at most `width` take of a call's time, as the profiler counts it.

    {"share": spread over the repeats, "largest": [operation, shapes of the operands, mean share] of some}
    """
    shares, largest = [], Counter()
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    for _ in range(repeats):
        with profile(activities=activities, record_shapes=True, acc_events=True) as profiler:
            call()
        times = Counter()
        for event in profiler.key_averages(group_by_input_shape=True):
            if event.device_type == DeviceType.CPU:  # not a kernel, whose time the operation that started it has
                time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
                times[event.key, str(event.input_shapes)] += time
        narrow = {key: time / times.total() for key, time in times.items() if _is_narrow(*key, width)}
        shares.append(sum(narrow.values()))
        largest.update({key: share / repeats for key, share in narrow.items()})
    return {"share": spread(shares), "largest": [[*key, share] for key, share in largest.most_common(6)]}


def largest_operations(call, repeats):
    """The operations that take the most of a call's time: [operation, shapes of the operands, share], eight at most."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True) as profiler:
        for _ in range(repeats):
            call()
    times = Counter()
    for event in profiler.key_averages(group_by_input_shape=True):
        times[event.key, str([shape for shape in event.input_shapes if shape])] += event.self_cpu_time_total
    return [[*key, time / times.total()] for key, time in times.most_common(8)]


def _is_narrow(operation, shapes, width):
    if operation not in ("aten::mm", "aten::addmm", "aten::addmm_"):
        return False
    return any(len(shape) == 2 and min(shape) <= width for shape in json.loads(shapes))


def saved_bytes(forward, model):
    """The bytes that a forward keeps for its backward beside the parameters, each piece of memory once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output would hold on to the operation that holds on to it, for ever

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    total = sum(kept.values())
    del result  # until here, or another tensor could get the address of one that was kept
    return total


def in_own_process(function, *arguments):
    """What a function returns in a process of its own, whose peak of memory is then its own."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def peak_bytes(function, *arguments, device):
    """The most memory of a process that does nothing but call this; on CUDA the most that tensors take there."""
    if device.type != "cuda":
        return in_own_process(_peak_bytes, function, arguments)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    function(*arguments)
    return torch.cuda.max_memory_allocated(device)


def _peak_bytes(function, arguments):
    function(*arguments)
    return results.peak_memory_bytes(torch.device("cpu"))["process"]
