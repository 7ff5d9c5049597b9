"""What a notebook could ask of Colab's page. The course must not: ipywidgets is shown by Colab itself."""


def enable_custom_widget_manager() -> None:
    raise RuntimeError("the course needs no widget manager but Colab's own")
