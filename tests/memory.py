"""How much torch's CPU allocator held at most while something ran."""

from itertools import accumulate

from torch.profiler import ProfilerActivity, profile


def peak_bytes(run):
    """(what run() returns, the most bytes that it had allocated and not yet freed at once)."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = run()
    events = (e.nbytes() for e in seen.profiler.kineto_results.events() if e.name() == "[memory]")
    return result, max(accumulate(events), default=0)
