"""Names of the layers that are no part of bwrap's command line."""

ABSTRACT = "the scope of abstract sockets"
DESCRIPTORS = "the closing of descriptors"
FILTER = "the system call filter"
OPEN_FILES = "the limit of open files"
TERMINAL = "the lack of a terminal"
