// A module for a Kuzzle application: each refresh takes a second and a half.
"use strict";

module.exports = (app) => {
  app.pipe.register("auth:beforeRefreshToken", async (request) => {
    await new Promise((resolve) => setTimeout(resolve, 1500));
    return request;
  });
};
