"""unit/ mirrors the package, distributed/ runs real ranks, contract/ every method with every binding."""
