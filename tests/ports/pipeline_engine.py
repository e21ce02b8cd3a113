"""A port for cases of kind schedule, from the case alone: two rules, a simulation and a checker.

Written from SPEC.md, without the package: for every entry it asks again and again whether it can start.
"""

import numpy as np

F, B, I, W, FB = range(5)  # noqa: E741  # the published names
NONE = -1


def run(case):
    if case.component == "plan" and case.arguments["schedule"] in ("gpipe", "1f1b"):
        return plan(case.arguments)
    if case.component == "legality":
        return legality(case.inputs["order"], case.inputs["placement"], case.arguments)
    return None


def plan(given):
    ranks, microbatches = given["ranks"], given["microbatches"]
    orders = []
    for rank in range(ranks):
        warm_up = min(ranks - rank, microbatches) if given["schedule"] == "1f1b" else microbatches
        forwards = [(F, rank, m, NONE, NONE) for m in range(microbatches)]
        backwards = [(B, rank, m, NONE, NONE) for m in range(microbatches)]
        order = forwards[:warm_up]
        for m in range(microbatches - warm_up):
            order += [backwards[m], forwards[warm_up + m]]
        orders.append(order + backwards[microbatches - warm_up :])
    order = np.array(orders)
    starts, made = [], {name: [] for name in ("makespan", "busy", "idle", "idle_within_span")}
    for durations in given["durations"]:
        start, end, left = simulate(order, given["stages"], durations)
        assert not left
        busy = [sum(end[r]) - sum(start[r]) for r in range(ranks)]
        whole = max(end[r][-1] for r in range(ranks))
        starts.append(start)
        made["makespan"].append(whole)
        made["busy"].append(busy)
        made["idle"].append([whole - own for own in busy])
        made["idle_within_span"].append([end[r][-1] - start[r][0] - busy[r] for r in range(ranks)])
    live = np.cumsum(np.where(order[..., 0] == F, 1, -1), -1).max(-1)
    released = {f"peak.released_at_{kind}": live for kind in "WI"}
    found = {"order": order, "start": starts, **made, **released}
    return {name: np.array(value) for name, value in found.items()}


def parts(row):
    kind, stage, microbatch, second, other = map(int, row)
    return [(F, stage, microbatch), (B, second, other)] if kind == FB else [(kind, stage, microbatch)]


def needs(action, stages):
    """Alternatives of what an action needs: each a set of results (kind F or I, stage, microbatch)."""
    kind, stage, microbatch = action
    if kind == F:
        return [(F, stage - 1, microbatch)] if stage else []
    if kind == W:
        return [(I, stage, microbatch)]
    after = [(I, stage + 1, microbatch)] if stage < stages - 1 else []
    return [(F, stage, microbatch), *after]


def simulate(order, stages, durations):
    """(start, end, entries that never start)."""
    scale = durations["scale"]
    start, end = [[] for _ in order], [[] for _ in order]
    rows = [[row for row in own if row[0] != NONE] for own in order]
    there, moved = {}, True  # result -> (when, rank)
    while moved:
        moved = False
        for rank, own in enumerate(rows):
            if len(start[rank]) == len(own):
                continue
            done = parts(own[len(start[rank])])
            wanted = [result for action in done for result in needs(action, stages)]
            if not all(result in there for result in wanted):
                continue
            begin = end[rank][-1] if end[rank] else 0
            for result in wanted:
                when, by = there[result]
                begin = max(begin, when + (durations["latency"] if by != rank else 0))
            scales = {scale[stage] for _, stage, _ in done}
            if len(done) == 2 and len(scales) == 1:
                took = durations["FB"] * scales.pop()
            else:
                took = sum(durations["FBIW"[kind]] * scale[stage] for kind, stage, _ in done)
            start[rank].append(begin)
            end[rank].append(begin + took)
            for kind, stage, microbatch in done:
                there[I if kind == B else kind, stage, microbatch] = (begin + took, rank)
            moved = True
    return start, end, [rank for rank, own in enumerate(rows) if len(start[rank]) < len(own)]


def legality(order, placement, given):
    stages, microbatches = given["stages"], given["microbatches"]
    homes, count = {}, {}
    illegal = False
    for rank, own in enumerate(order):
        for row in own[own[:, 0] != NONE]:
            for kind, stage, microbatch in parts(row):
                known = 0 <= stage < stages and 0 <= microbatch < microbatches
                illegal |= not known or stage not in placement[rank]
                homes.setdefault((stage, microbatch), set()).add(rank)
                count.setdefault((stage, microbatch), []).append(kind)
    for stage in range(stages):
        for microbatch in range(microbatches):
            kinds = sorted(count.get((stage, microbatch), []))
            illegal |= kinds not in ([F, B], [F, I, W]) or len(homes[stage, microbatch]) > 1
    even = {"F": 1, "B": 1, "I": 1, "W": 1, "FB": 1, "latency": 0, "scale": [1] * stages}
    illegal = illegal or bool(simulate(order, stages, even)[2])
    return {"illegal": np.array([int(illegal)])}
