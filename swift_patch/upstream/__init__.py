"""The same functions as a change to a checkout of ms-swift: `swift-patch upstream`."""
