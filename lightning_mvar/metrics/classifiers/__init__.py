"""Small classifiers of a data set, trained on its own images, that also serve as feature extractors."""
