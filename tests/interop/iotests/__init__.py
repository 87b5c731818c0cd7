"""The subjects of QEMU's numbered image tests that need no virtual machine, played through `nbdimg serve`.

The scripts here are our own: a number only says which public test has the same subject.
"""
