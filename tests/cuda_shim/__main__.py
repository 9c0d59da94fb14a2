"""Prints the most shared memory that the launches of depthwise_conv2d ask for on each device of the stand-in:
PYTHONPATH=tests python -m cuda_shim"""

import torch

from . import DEVICES, SIZES, STEPS, Failure, plan

print(f"{'K':>2} {'step':10} {'dtype':8} " + " ".join(f"{name:>26}" for name in DEVICES))
for kernel in (3, 5, 7, 11):
    for name, step in STEPS.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            row = []
            for device in range(len(DEVICES)):
                most, failed = {"forward": 0, "backward": 0}, 0
                for size in SIZES:
                    try:
                        launches = plan(size, kernel, dtype, step, device)
                    except Failure:
                        failed += 1
                        continue
                    for launch in launches:
                        for which in most:
                            if which in launch.kernel:
                                most[which] = max(most[which], launch.shared)
                text = " ".join(f"{n:6}" for n in most.values())
                row.append(f"{text} {f'({failed} fail)' if failed else '':>12}")
            print(f"{kernel:2} {name:10} {str(dtype)[6:]:8} " + " ".join(f"{cell:>26}" for cell in row))
