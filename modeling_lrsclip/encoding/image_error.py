"""The one error of images, whichever library reads them."""


class ImageError(ValueError):
    """An image that cannot be used: its name, and the reason in a few words."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name} cannot be read as an image ({self.reason}); replace it or remove its row."
