"""Where it answers."""

from django.urls import path

from . import views

urlpatterns = [
    path("sign-in", views.sign_in, name="sign_in"),
    path("sign-out", views.sign_out, name="sign_out"),
    path("me", views.me, name="me"),
    path("me-async", views.me_async),
    path("broken", views.broken),
    path("site", views.site),
]
