class Features:
    def __init__(self, layers=()):
        self.layers = layers
