"""Engines: built from a bundle's graphs (`build`), kept (`cache`), given new weights (`refit`)."""
