"""A sink that is stopped, as a run that is killed."""

from converters import FolderSink


class Stopped(Exception):
    pass


class StoppingSink(FolderSink):
    """Is stopped after the block `after`, which is on the disk then."""

    after = 0

    def write(self, index, block, rows):
        super().write(index, block, rows)
        if index == self.after:
            raise Stopped
