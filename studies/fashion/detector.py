"""Trains the detector for Fashion-MNIST and writes it into the package: some minutes on one core.

    python studies/fashion/detector.py

Prints its accuracy on the 10,000 test pictures, half precision as saved.
"""

import torch

from elit.data.idx import fashion_mnist
from elit.evaluate.fashion_mnist import WEIGHTS, FashionDetector, accuracy, save_classifier, train_fashion_classifier


def main() -> None:
    torch.set_num_threads(1)
    save_classifier(train_fashion_classifier(fashion_mnist("train")), WEIGHTS)
    print(
        f"accuracy on the test split: {accuracy(FashionDetector().classifier, fashion_mnist('test')):.4f} -> {WEIGHTS}"
    )


if __name__ == "__main__":
    main()
