"""Parts of libraries that the package uses although they are not public: each may change with any release.

Each test checks one of them against the installed release and says in its docstring what to do when it fails.
`relies_on` lists what a test covers. `test_list.py` compares this list with the source of the package, so that a new
access needs a test, and a test is removed with its last access.
"""
