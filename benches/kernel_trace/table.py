#!/usr/bin/env python3
"""Where the time of a program's steps goes, of a trace that inject.cpp wrote.

A kernel begins before the one before it has ended, so what it costs is what it adds: from when all before it have ended
to its own end, and nothing where it ran beside one that ends later. Times are medians over the steps that look alike
(the same kernels in the same order), summed by kernel and what it is behind.
"""
import argparse
import collections
import re
import statistics
import subprocess

Kernel = collections.namedtuple("Kernel", "start end name")


def read(path):
    """The kernels in the order of their beginnings."""
    names, rows = {}, []
    with open(path) as lines:
        for line in lines:
            first, rest = line.rstrip("\n").split(",", 1)
            if first == "name":
                number, name = rest.split(",", 1)
                names[number] = name
            else:
                start, end = rest.split(",")
                rows.append((int(start), int(end), first))
    short = dict(zip(names, map(shorten, demangled(names.values()))))
    return [Kernel(start, end, short[number]) for start, end, number in sorted(rows)]


def demangled(names):
    try:
        return subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        return list(names)


def shorten(name):
    """A kernel and its template's arguments, without namespaces, types of enumerators, and parameters."""
    for noise in (r"\(anonymous namespace\)::", r"\w+::", r"\(\w+\)(?=\d)", r"^void ", r"\(.*"):
        name = re.sub(noise, "", name)
    return name[:60]


def steps_of(kernels, first):
    """Of each step its kernels, each with what it adds."""
    steps, last = [], None
    for kernel in kernels:
        if first in kernel.name:
            steps.append([])
        if steps:
            steps[-1].append((kernel, max(0, kernel.end - (last if last is not None else kernel.start))))
        last = max(kernel.end, last or 0)
    return steps


def show(alike):
    totals = [sum(added for _, added in step) for step in alike]
    print(f"\n{len(alike)} steps of {len(alike[0])} kernels, {statistics.median(totals) / 1e3:.1f} us")
    places, before = collections.OrderedDict(), None
    for i, (kernel, _) in enumerate(alike[0]):
        places.setdefault((kernel.name, before), []).append(i)
        before = kernel.name
    print(f"{'us':>9}  {'calls':>5}  {'us each':>8}  {'begin to end':>12}")
    for (name, behind), where in places.items():
        added = [statistics.median(step[i][1] for step in alike) / 1e3 for i in where]
        whole = [statistics.median(step[i][0].end - step[i][0].start for step in alike) / 1e3 for i in where]
        print(f"{sum(added):9.1f}  {len(where):5}  {statistics.mean(added):8.2f}  {statistics.mean(whole):12.2f}  {name}"
              + (f"  behind {behind}" if behind else ""))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", help="what inject.cpp wrote")
    parser.add_argument("--first", default="embed", metavar="KERNEL", help="what a step begins with (embed)")
    parser.add_argument("--top", type=int, default=4, metavar="N", help="so many kinds of steps, the costliest (4)")
    args = parser.parse_args()
    kinds = collections.defaultdict(list)
    for step in steps_of(read(args.trace), args.first):
        kinds[tuple(kernel.name for kernel, _ in step)].append(step)
    if not kinds:
        parser.error(f"{args.trace} has no kernel with {args.first!r} in its name")
    for alike in sorted(kinds.values(), key=lambda alike: -sum(added for step in alike for _, added in step))[: args.top]:
        show(alike)


if __name__ == "__main__":
    main()
