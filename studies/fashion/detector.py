"""Trains the detector for Fashion-MNIST and writes it into the package: some minutes on one core.

    python studies/fashion/detector.py

Prints its accuracy on the 10,000 test pictures, half precision as saved.
"""

import argparse
from pathlib import Path

import torch

from elit.data.idx import fashion_mnist
from elit.evaluate.fashion_mnist import WEIGHTS, FashionDetector, accuracy, save_classifier, train_fashion_classifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    save_classifier(train_fashion_classifier(fashion_mnist("train")), args.out)
    share = accuracy(FashionDetector(args.out).classifier, fashion_mnist("test"))
    print(f"accuracy on the test split: {share:.4f} -> {args.out}")


if __name__ == "__main__":
    main()
