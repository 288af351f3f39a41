/* SPDX-License-Identifier: Apache-2.0
 *
 * A Python extension with one function that takes any arguments and does nothing: what a call costs by itself.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

static PyObject *nothing(PyObject *module, PyObject *const *arguments, Py_ssize_t count)
{
	(void)module;
	(void)arguments;
	(void)count;
	Py_RETURN_NONE;
}

/* By way of void (*)(void), which is compatible with every function pointer. */
static PyMethodDef methods[] = {
	{ "nothing", (PyCFunction)(void (*)(void))nothing, METH_FASTCALL, "Do nothing." },
	{ NULL, NULL, 0, NULL },
};

static struct PyModuleDef definition = {
	PyModuleDef_HEAD_INIT, "empty_module", NULL, 0, methods, NULL, NULL, NULL, NULL,
};

PyMODINIT_FUNC PyInit_empty_module(void)
{
	return PyModule_Create(&definition);
}
