"""Where it answers."""

from django.urls import path

from . import views

urlpatterns = [
    path("sign-in", views.sign_in, name="sign_in"),
    path("me", views.me, name="me"),
    path("broken", views.broken),
    path("site", views.site),
]
