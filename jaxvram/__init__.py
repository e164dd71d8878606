"""jaxvram: landmark architectures, trained on one 12 GB GPU, with the memory known before the first step."""

__version__ = "0.1.0"
