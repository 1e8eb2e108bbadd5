"""``python -m train``: trains a sparse autoencoder; with no flags, the default one on the default data."""

import dataclasses

from . import cli
from .config import TrainConfig
from .loop import train


def main(config: TrainConfig) -> None:
    if config.data is None:
        from .extract import ExtractConfig, extract

        config = dataclasses.replace(config, data=extract(ExtractConfig()))
    workdir = train(config)
    print(f"trained: {workdir} (next: python -m {__package__}.evaluate {workdir})")


if __name__ == "__main__":
    cli.run(main, prog=f"python -m {__package__}")
