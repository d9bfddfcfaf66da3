"""Training sources, verification pairs, synthetic faces and augmentation."""
