"use strict";
// Each slider has one layer per method; the left layer is on top and is clipped at the border.
for (const figure of document.querySelectorAll(".compare")) {
  const stage = figure.querySelector(".stage"), range = figure.querySelector("input");
  const [left, right] = figure.querySelectorAll("select");
  const layers = [...stage.querySelectorAll("img")], [leftTag, rightTag] = stage.querySelectorAll(".tag");
  const name = select => select.selectedOptions[0].textContent;
  const show = () => {
    layers.forEach((layer, index) => {
      const isLeft = String(index) === left.value, isRight = String(index) === right.value;
      layer.classList.toggle("shown", isLeft || isRight);
      layer.classList.toggle("over", isLeft && !isRight);
    });
    leftTag.textContent = name(left);
    rightTag.textContent = name(right);
    figure.querySelector(".left-score").textContent = left.selectedOptions[0].dataset.score;
    figure.querySelector(".right-score").textContent = right.selectedOptions[0].dataset.score;
    range.setAttribute("aria-valuetext", `${Math.round(range.value)}% ${name(left)}, the rest ${name(right)}`);
    stage.style.setProperty("--at", `${range.value}%`);
  };
  for (const control of [left, right, range]) control.addEventListener("input", show);
  show();
}
