"""Milliseconds and GFLOPs of a forward at every budget, beside the plain DiT of the same size, in one run.

    python benchmarks/forward.py                       # five minutes: ELIT-DiT-B/2 at 32×32×4, batch 8
    python benchmarks/forward.py --size XL --device cuda --dtype bfloat16

Wall-clock should follow FLOPs: `time/FLOPs` is time(J̃)/time(full) over FLOPs(J̃)/FLOPs(full). Rounds go through all
budgets in turn and the median over rounds is taken, so that a slow moment of the machine hits all of them alike.
"""

import argparse
import json
import platform
import statistics
import time

import torch

import elit


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="B", choices=["S", "B", "L", "XL"])
    parser.add_argument("--sample-size", type=int, default=32)
    parser.add_argument("--in-channels", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--json", action="store_true", help="print the rows as JSON last")
    args = parser.parse_args()

    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    settings = {"sample_size": args.sample_size, "in_channels": args.in_channels}
    names = [f"DiT-{args.size}/2", f"ELIT-DiT-{args.size}/2"]
    torch.set_default_dtype(dtype)
    with device:
        models = {name: elit.create_model(name, **settings).eval() for name in names}
    cases = [(name, budget) for name, model in models.items() for budget in (model.budgets[::-1] or (None,))]

    x = torch.randn(args.batch_size, args.in_channels, args.sample_size, args.sample_size).to(device, dtype)
    t, y = torch.full((args.batch_size,), 0.5).to(device), torch.zeros(args.batch_size, dtype=torch.int64).to(device)

    def seconds(name: str, budget: int | None) -> float:
        start = time.perf_counter()
        with torch.no_grad():
            models[name](x, t, y, budget)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    times: dict[tuple[str, int | None], list[float]] = {case: [] for case in cases}
    for round_ in range(args.rounds + 1):
        for case in cases:
            elapsed = seconds(*case)
            if round_:  # the first round warms up
                times[case].append(elapsed)

    full = (names[1], models[names[1]].budgets[-1])
    full_ms, full_flops = statistics.median(times[full]), elit.count_flops(models[names[1]])
    rows = []
    for name, budget in cases:
        ms = statistics.median(times[name, budget])
        flops = elit.count_flops(models[name], budget=budget)
        ratio = (ms / full_ms) / (flops / full_flops)
        rows.append(
            {
                "model": name,
                "budget": budget,
                "ms": 1e3 * ms,
                "gflops": args.batch_size * flops / 1e9,
                "time_of_full": ms / full_ms,
                "flops_of_full": flops / full_flops,
                "time_over_flops": ratio,
            }
        )
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    print(f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.dtype}")
    print(f"batch {args.batch_size} of {args.sample_size}×{args.sample_size}×{args.in_channels}, {args.rounds} rounds")
    print(f"{'model':>16} {'latents':>7} {'ms':>9} {'GFLOPs':>9} {'time':>7} {'FLOPs':>7} {'time/FLOPs':>10}")
    for row in rows:
        budget_text = "" if row["budget"] is None else row["budget"]
        print(
            f"{row['model']:>16} {budget_text:>7} {row['ms']:9.1f} {row['gflops']:9.1f} "
            f"{row['time_of_full']:7.3f} {row['flops_of_full']:7.3f} {row['time_over_flops']:10.3f}"
        )
    overhead = full_ms / statistics.median(times[names[0], None])
    cost = full_flops / elit.count_flops(models[names[0]])
    print(f"full budget over {names[0]}: {overhead:.3f} × the time, {cost:.3f} × the FLOPs")
    if args.json:
        print(json.dumps({"rows": rows, "full_over_baseline": {"time": overhead, "flops": cost}}))


if __name__ == "__main__":
    main()
